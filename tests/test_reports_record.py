"""The record: what passes the schema, what is refused and how, and that a file is there as a whole or not at all."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from reports_factory import make_failure, make_record

from reports import files, parts, record, schema

MEASURED = ["metrics", "memory", "time", "trainable_parameters", "headline"]


def test_write_then_load_gives_the_same_record(tmp_path):
    run = make_record()
    path = record.write(run, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / f"{run['run_id']}.json"
    assert record.load(path) == run


def test_writing_again_replaces_the_record(tmp_path):
    record.write(make_record(), tmp_path)
    path = record.write(make_record(metrics={"accuracy": 0.75}), tmp_path)
    assert record.load(path)["metrics"] == {"accuracy": 0.75}
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_run_may_have_measured_nothing(tmp_path):
    run = make_failure("failed", "ValueError: no such file\n  at line 3", headline=None, higher_is_better=None)
    assert record.load(record.write(run, tmp_path)) == run


@pytest.mark.parametrize("field", MEASURED)
def test_an_ok_run_has_measured_everything(field):
    with pytest.raises(
        ValueError, match=f"^runs/a.json: '{field}' is null, which it may only be in a run that isn't ok"
    ):
        record.check(make_record(**{field: None}), "runs/a.json")


@pytest.mark.parametrize("field", ["task", "seed", "hyperparameters", "training", "history", "environment"])
def test_what_was_known_beforehand_is_never_null(field):
    with pytest.raises(ValueError, match=f"'{field}' must be .*, not None"):
        record.check(make_failure(**{field: None}), "a.json")


def _fields(value, path=()):
    for key, item in value.items() if isinstance(value, dict) else ():
        if path[:1] not in (("environment",), ("hyperparameters",), ("metrics",)):
            yield (*path, key)
            yield from _fields(item, (*path, key))


@pytest.mark.parametrize("path", list(_fields(make_record())), ids=".".join)
def test_a_missing_field_is_named(path):
    run = make_record()
    place = run
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    match = "schema version None" if path == ("schema",) else f"^a.json: field '{'.'.join(path)}' .* is missing"
    with pytest.raises(ValueError, match=match):
        record.check(run, "a.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "1"}, "'seed' must be an integer, not '1'"),
        ({"seed": True}, "'seed' must be an integer, not True"),
        ({"training__batch_size": 2.5}, "'training.batch_size' must be an integer, not 2.5"),
        ({"training__gradient_checkpointing": 0}, "'training.gradient_checkpointing' must be true or false, not 0"),
        ({"time__train_seconds": "1 s"}, "'time.train_seconds' must be a number"),
        ({"metrics": {"accuracy": "high"}}, "'metrics.accuracy' must be a number"),
        ({"history": {"step": 1}}, "'history' must be a list"),
        ({"history": [1]}, r"'history\[0\]' must be an object, not 1"),
        ({"history": [{"step": 1}]}, r"'history\[0\].tokens' .* is missing"),
        ({"memory": [1, 2]}, "'memory' must be an object"),
        ({"schema": 2}, "schema version 2 is unknown, this membench reads version 1"),
        ({"status": "fine"}, "'status' must be one of ok, failed, out_of_memory, diverged, not 'fine'"),
        ({"error": "Out of memory."}, "'error' is 'Out of memory.', but the status is 'ok'"),
        ({"status": "failed"}, "'error' is None, but the status is 'failed'"),
        ({"headline": "f1"}, r"the headline 'f1' isn't among 'metrics' \(accuracy\)"),
        ({"memory__at_peak__weights_bytes": 1}, r"add up to 83886081 bytes, but the peak is 104857600"),
        ({"time__train_seconds": float("nan")}, "'time.train_seconds' is nan, which JSON can't hold"),
        ({"hyperparameters": {"clip": [1.0, float("inf")]}}, r"'hyperparameters.clip.1' is inf"),
        (
            {"memory__peak_allocated_bytes": 0},
            "'memory.peak_allocated_bytes' .* must be at least 1 and at most 9.*, not 0",
        ),
        ({"memory__maximum__weights_bytes": -1}, "'memory.maximum.weights_bytes' .* must be at least 0 .*, not -1"),
        ({"training__steps": 0}, "'training.steps' .* must be at least 1 .*, not 0"),
        ({"training__warmup_fraction": 1.5}, "'training.warmup_fraction' .* must be at least 0 and at most 1, not 1.5"),
        ({"trained_fraction": -0.1}, "'trained_fraction' .* must be at least 0 and at most 1, not -0.1"),
        ({"time__tokens_per_second": 1e300}, r"'time.tokens_per_second' .* at most 9.22337e\+18, not 1e\+300"),
        ({"metrics": {"accuracy": -1e200}}, "'metrics.accuracy' .* must be at least -1e\\+150"),
        ({"parameters": 10**400}, "'parameters' is a whole number beyond 2\\^63"),
        ({"parameters": 10**5000}, "'parameters' is a whole number beyond 2\\^63"),
        ({"hyperparameters": {"betas": [0.9, 10**400]}}, "'hyperparameters.betas.1' is a whole number beyond 2\\^63"),
        (
            {"history": [{"step": 10**400}]},
            r"'history\[0\].step' .* must be at least 1 and at most 9.22337e\+18, not 10+\.\.\.",
        ),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(change, words):
    with pytest.raises(ValueError, match=f"^x/a.json: .*{words}") as caught:
        record.check(make_record(**change), "x/a.json")
    assert "\n" not in str(caught.value)


def test_a_score_may_be_less_than_nothing_and_a_loss_as_large_as_it_gets():
    entry = make_record()["history"][0]
    record.check(
        make_record(metrics={"matthews": -0.3}, headline="matthews", history=[{**entry, "loss": 1e100}]), "a.json"
    )


def test_a_record_out_of_bounds_keeps_no_other_from_being_read(tmp_path):
    record.write(make_record(), tmp_path)
    run = make_record(run_id="bad", memory__peak_allocated_bytes=0, parameters=10**400)
    (tmp_path / "bad.json").write_text(json.dumps(run))
    found = record.read(tmp_path)
    assert len(found.records) == 1 and len(found.problems) == 1 and "bad.json" in found.problems[0]


def test_the_defaults_of_what_old_records_lack_are_those_of_the_options():
    run = make_record()
    assert not {"final_fraction", "evaluate_before", "options"} & set(run["training"])
    known = schema.training(run)
    assert (known["final_fraction"], known["evaluate_before"], known["options"]) == (0.0, False, {})
    assert known["batch_size"] == run["training"]["batch_size"]


def test_what_nothing_was_measured_of_is_in_a_record_all_the_same():
    assert schema.unmeasured().keys() <= make_record().keys()
    assert schema.unmeasured()["history"] == [] and schema.unmeasured()["memory"] is None


def test_a_part_of_memory_that_came_later_is_nothing_in_the_records_before():
    part = parts.Part("buffers", "buffers", "sky", "of communication", later=True)
    assert part.of(make_record()["memory"]["at_peak"]) == 0
    assert part.of({"buffers_bytes": 3}) == 3


def test_an_integer_is_a_number_and_extra_fields_are_welcome():
    record.check(make_record(time__train_seconds=10, environment={"anything": {"at": ["all"]}}, later="x"), "a.json")
    record.check(make_record(memory__peak_phase="update", memory__components={"head": {"weights_bytes": 1}}), "a.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 1,\n "task": }', "malformed JSON, line 2 column 10"),
        ("", "malformed JSON, line 1 column 1"),
        ("[1]", r"a record is a JSON object, not \[1\]"),
        ('{"schema": 1, "x": NaN}', "'x' is nan"),
        ('{"schema": 1, "seed": ' + 5000 * "9" + "}", "malformed JSON: a number with too many digits"),
        ("\udcff", "not a text file in UTF-8"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, text, words):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"^{path}: {words}"):
        record.load_folder(tmp_path)


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone.json: can't be read: No such file"):
        record.load(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="gone: no such folder of records"):
        record.load_folder(tmp_path / "gone")
    assert record.load_folder(tmp_path) == []


def test_a_folder_is_sorted_and_leaves_out_what_is_no_record(tmp_path):
    for task, method, seed in [("b", "x", 10), ("b", "x", 2), ("b", "adamw", 0), ("a", "z", 0)]:
        record.write(make_record(task=task, method=method, seed=seed), tmp_path)
    (tmp_path / ".half.json").write_text("{")
    (tmp_path / "notes.txt").write_text("x")
    order = [(run["task"], run["method"], run["seed"]) for run in record.load_folder(tmp_path)]
    assert order == [("a", "z", 0), ("b", "adamw", 0), ("b", "x", 2), ("b", "x", 10)]


def test_a_write_that_dies_midway_leaves_the_old_record_and_no_litter(tmp_path, monkeypatch):
    path = record.write(make_record(), tmp_path)
    before = path.read_bytes()

    def die(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="disk full"):
        record.write(make_record(metrics={"accuracy": 0.9}), tmp_path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_bad_record_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="'seed' must be an integer"):
        record.write(make_record(seed=None), tmp_path)
    assert os.listdir(tmp_path) == []


def test_run_id_is_safe_as_a_file_name_and_says_what_ran():
    name = record.run_id("superglue/rte", "my.package:BAdam", "meta-llama/Llama-3.2-1B", 3, {"lr": 1e-3})
    *words, digest = name.split("--")
    assert words == ["superglue-rte", "my-package-BAdam", "meta-llama-Llama-3-2-1B", "s3"]
    assert len(digest) == 10
    assert set(digest) <= set("0123456789abcdef")


def test_run_id_of_a_long_path_fits_into_a_file_name_and_keeps_the_end():
    name = record.run_id("t", "m", "/home/" + "x" * 300 + "/../MiniLM.v2", 0, {})
    assert len(name) < 120
    assert "x-MiniLM-v2--s0--" in name


def test_run_id_is_the_hash_of_canonical_json():
    canonical = b'["a/b","m","n",0,{"x":1,"y":[1,2]}]'
    expected = hashlib.sha256(canonical).hexdigest()[:10]
    assert record.run_id("a/b", "m", "n", 0, {"y": (1, 2), "x": 1}) == f"a-b--m--n--s0--{expected}"
    assert record.run_id("a/b", "m", "n", 0, {"x": 1, "y": [1, 2]}).endswith(expected)


def test_run_id_differs_where_the_run_differs():
    runs = [
        ("a/b", "m", "n", 0, {}),
        ("a-b", "m", "n", 0, {}),
        ("a/b", "m", "n", 1, {}),
        ("a/b", "m", "n", 0, {"x": 1}),
    ]
    assert len({record.run_id(*run) for run in runs}) == len(runs)


def test_run_id_refuses_a_configuration_that_is_not_json():
    with pytest.raises(ValueError, match="The configuration of m on t isn't JSON"):
        record.run_id("t", "m", "n", 0, {"x": float("nan")})


def test_the_schema_is_json_in_what_it_allows():
    assert len({field.path for field in record.SCHEMA}) == len(record.SCHEMA)
    assert all(field.comment for field in record.SCHEMA)
    assert json.loads(json.dumps(make_record())) == make_record()


def test_a_file_that_is_no_record_keeps_none_of_the_others_from_being_read(tmp_path):
    whole = record.write(make_record(), tmp_path)
    (tmp_path / "cut.json").write_text(whole.read_text()[:500])
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "next.json").write_text(json.dumps(make_record(schema=2)))
    found = record.read(tmp_path)
    assert found.records == [make_record()]
    named = {problem.partition(".json")[0].rpartition("/")[2]: problem for problem in found.problems}
    assert set(named) == {"cut", "empty", "deep", "next"}
    assert "schema version 2 is unknown" in named["next"] and all("\n" not in problem for problem in named.values())


def test_a_file_may_hold_one_record_or_a_list_of_them(tmp_path):
    one, other = make_record(seed=1), make_record(seed=0)
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(one))
    assert record.read(path) == ([one], [])
    path.write_text(json.dumps([one, other, {"schema": 1}]))
    found = record.read(path)
    assert found.records == [other, one]  # in order
    assert found.problems == [
        f"{path}, record 3: field 'run_id' (<task>--<method>--<model>--s<seed>--<hash>, also the "
        "file's name) is missing."
    ]


@pytest.mark.slow
def test_two_thousand_records_are_read_in_seconds(tmp_path):
    line = {"step": 1, "tokens": 900, "seconds": 0.02, "loss": 0.7, "learning_rate": 1e-4, "metrics": None}
    made = make_record(history=[line] * 120)
    for number in range(2000):
        (tmp_path / f"{number}.json").write_text(json.dumps({**made, "seed": number}))
    start = time.process_time()
    assert len(record.read(tmp_path).records) == 2000
    assert time.process_time() - start < 10  # 1 on a machine that does nothing else


def test_a_copy_of_a_file_beside_it_is_no_other_run(tmp_path):
    """Nor an older one, nor one more in the table of runs."""
    runs = [make_record(seed=seed) for seed in range(2)]
    for run in runs:
        record.write(run, tmp_path)
        (tmp_path / f"copy-of-{run['run_id']}.json").write_text(json.dumps(run))
    changed = {**runs[0], "metrics": {"accuracy": 0.9}}  # the same name, but another run
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    found = record.read(tmp_path).records
    assert len(found) == 3 and all(run in found for run in (*runs, changed))


@pytest.mark.parametrize("name", ["../../README", "a/b", "/a", ".hidden", "", "x" * 300])
def test_a_name_that_no_file_of_a_folder_can_have_is_refused_wherever_it_is_read(tmp_path, name):
    (tmp_path / "a.json").write_text(json.dumps(make_record(run_id=name)))
    found = record.read(tmp_path)
    assert not found.records and "'run_id' must be the name of a file" in found.problems[0]


def test_a_device_in_the_place_of_a_record_is_a_problem_and_not_read_without_end(tmp_path):
    (tmp_path / "a.json").symlink_to("/dev/zero")
    assert record.read(tmp_path).problems == [
        f"{tmp_path}/a.json: can't be read: it is a pipe or a device, not a file."
    ]


def test_writers_of_one_file_at_once_leave_one_of_their_contents_and_follow_no_planted_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    place = tmp_path / "folder" / "out.json"
    place.parent.mkdir()
    (place.parent / f".out.json.{os.getpid()}.tmp").symlink_to(victim)
    contents = [str(number).encode() * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: files.write(place, content), contents * 4))
    assert place.read_bytes() in contents
    assert victim.read_text() == "mine"
    assert len(os.listdir(place.parent)) == 2
