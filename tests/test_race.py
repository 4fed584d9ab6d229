"""The races against other packages: their arithmetic, their peers, and what the command prints."""

import importlib.util
import json
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

import optimizers
from benchmarks import measure, parts, race, races, seen
from benchmarks.measure import Result
from benchmarks.models import SIZES, batch, build
from benchmarks.paired import Ratio, interleave, paired_ratio
from benchmarks.races import RACES, Race
from benchmarks.side import Side, largest_difference

TINY = SIZES["tiny"]
FAIR = Ratio(1.0, 0.99, 1.01)


def installed(name):
    if not RACES[name].installed:
        pytest.skip(f"{RACES[name].peer} is not installed")
    return RACES[name]


def result(update=FAIR, step=FAIR, ours=100, theirs=100, difference=0.0, **of_race):
    fields = {"peer": "p", "package": "torch", "ours": None, "theirs": None, **of_race}
    return Result("m", Race(**fields), update, step, ours, theirs, difference)


# ---- pairs and ratios


def test_the_two_sides_take_turns_at_going_first_and_the_warm_up_is_left_out():
    done = []

    def side(name):
        def step(number):
            done.append((name, number))
            return {"step": 10.0 * number + (name == "ours")}

        return step

    ours, theirs = interleave(side("ours"), side("theirs"), steps=2, warm_up=1)
    assert done == [("ours", 0), ("theirs", 0), ("theirs", 1), ("ours", 1), ("ours", 2), ("theirs", 2)]
    assert ours == [{"step": 11.0}, {"step": 21.0}]
    assert theirs == [{"step": 10.0}, {"step": 20.0}]


def test_the_ratio_is_the_median_of_each_pairs_own():
    # a load that slows the second pair down tenfold on both sides doesn't show; the ratio of medians would be 0.75
    assert paired_ratio([1.0, 30.0, 3.0], [2.0, 60.0, 4.0]).median == 0.5


def test_equal_ratios_have_no_spread_and_unequal_ones_an_interval_around_the_median():
    assert paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == Ratio(2.0, 2.0, 2.0)
    spread = paired_ratio([0.9, 1.0, 1.1] * 7, [1.0] * 21)
    assert 0.9 <= spread.low <= spread.median == 1.0 <= spread.high <= 1.1
    assert spread.low < spread.high


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = []
    for trial in range(200):
        noise = torch.randn(20, generator=generator).mul(0.1).exp().tolist()
        ratio = paired_ratio(noise, [1.0] * 20, seed=trial)
        covered.append(ratio.low <= 1.0 <= ratio.high)
    assert 0.88 <= statistics.mean(covered) <= 1.0


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_is_no_pair_is_refused(ours, theirs):
    with pytest.raises(ValueError, match="pairs are needed"):
        paired_ratio(ours, theirs)


# ---- what is won and what is lost


def test_a_ratio_holds_where_its_interval_reaches_the_limit():
    assert result(update=Ratio(1.05, 0.99, 1.1)).lost() == []
    assert result(update=Ratio(1.05, 1.01, 1.1)).lost() == ["update time 1.050 [1.010, 1.100] above 1.0"]
    assert result(update=Ratio(1.05, 1.01, 1.1), update_limit=1.02).lost() == []
    assert result(step=Ratio(1.2, 1.1, 1.3)).lost() == ["step time 1.200 [1.100, 1.300] above 1.0"]


def test_memory_and_weights_have_no_noise():
    assert result(ours=101, theirs=100).memory == 1.01
    assert result(ours=101, theirs=100).lost() == ["peak memory 1.0100 above 1"]
    assert result(ours=100, theirs=101).lost() == []
    assert result(difference=1e-9).lost() == ["weights differ by 1.0e-09, above 0.0"]
    assert result(difference=1e-9, same_weights=1e-8).lost() == []


def test_a_comparison_between_unequals_has_no_loser():
    slow = Ratio(2.0, 1.9, 2.1)
    assert result(update=slow, step=slow, ours=200, difference=1.0, same_weights=None, update_limit=None).lost() == []


def test_the_difference_is_the_largest_of_any_weight():
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert largest_difference(one, other) == 0.0
    with torch.no_grad():
        other.weight[1, 2] += 0.25
        other.bias[0] -= 0.5
    assert largest_difference(one, other) == pytest.approx(0.5)
    with torch.no_grad():
        other.bias[1] = math.nan
    assert math.isnan(largest_difference(one, other))  # which no limit holds
    assert result(difference=math.nan, same_weights=1.0).lost()


# ---- the races


def test_every_method_has_a_race():
    assert set(optimizers.available()) <= set(RACES)


def test_both_sides_start_from_the_same_weights_and_read_the_same_data():
    assert largest_difference(build(TINY), build(TINY)) == 0.0
    assert torch.equal(batch(TINY, 3)["input_ids"], batch(TINY, 3)["input_ids"])
    assert not torch.equal(batch(TINY, 3)["input_ids"], batch(TINY, 4)["input_ids"])


def test_the_full_size_has_about_100_million_parameters_and_8_blocks():
    with torch.device("meta"):
        model = build(SIZES["100m"])
    assert 95e6 < sum(p.numel() for p in model.parameters()) < 110e6
    assert len(model.model.layers) == 8


@pytest.mark.parametrize("name", RACES)
def test_ours_ends_with_the_peers_weights_and_never_needs_more_memory(name):
    # On a CPU with AVX-512 bitsandbytes restores rows shorter than a block, 64 weights, wrongly
    size = replace(TINY, width=64) if name.startswith("qlora") else TINY
    outcome = measure.run(name, installed(name), size, steps=6, warm_up=1)
    assert outcome.race.same_weights is None or outcome.difference <= outcome.race.same_weights
    assert outcome.race.update_limit is None or outcome.memory <= outcome.race.memory_limit
    for ratio in (outcome.update, outcome.step):
        assert 0.0 < ratio.low <= ratio.median <= ratio.high


@pytest.mark.parametrize("name", ["adamw", "lomo", "lomo-clipped", "lora", "mezo"])
def test_the_seconds_of_a_step_are_those_of_its_parts(name):
    for side in installed(name).sides(TINY):
        seconds = side.step(0)
        assert seconds["step"] >= seconds["forward"] + seconds["backward"]
        assert 0.0 < seconds["update"] < seconds["step"]
        if side.optimizer.in_backward:
            assert seconds["update"] < seconds["backward"]


def test_the_peers_trained_weights_move():
    for name in RACES:
        if RACES[name].installed:
            side = RACES[name].sides(TINY)[1]
            side.step(0)
            start = build(TINY)
            if name.partition("-")[0] not in ("lora", "vera", "qlora", "welore"):  # they have other weights than it had
                assert largest_difference(start, side.model) > 0.0, name


def test_memory_is_the_same_each_time_and_counts_the_masters_that_badam_makes():
    fair = measure.peaks(installed("badam"), TINY)
    assert measure.peaks(RACES["badam"], TINY) == fair
    block = 4 * sum(p.numel() for p in build(TINY).model.layers[0].parameters())
    assert fair[1] - fair[0] >= block


# ---- the parts


def test_galore_with_a_full_svd_ends_with_its_packages_weights():
    installed("galore")
    part = parts.galore_exact(TINY)
    assert part.holds
    assert part.value <= 1e-5


def test_a_refresh_and_an_update_path_are_ratios_of_times():
    installed("galore"), installed("lomo")
    for part in (parts.galore_refresh(24, 48, 4), parts.lomo_updates(20, steps=3)):
        assert part.value > 0.0
        assert part.holds == (part.value <= part.limit)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_badams_backward_pass_is_held_to_what_its_paper_counts(checkpointing):
    part = parts.badam_backward(TINY, checkpointing, rounds=1)
    linear = TINY.layers * (4 * TINY.width**2 + 3 * TINY.width * TINY.mlp)
    head = TINY.width * TINY.vocabulary
    assert part.limit == pytest.approx((4 / 6 * linear + head) / (linear + head))  # (D + 1) / 2D of 3 layers
    assert part.value > 0.0


# ---- the command


def test_the_command_prints_a_row_and_the_notes_of_each_race_and_writes_the_numbers(tmp_path, capsys):
    path = tmp_path / "race.json"
    code = race.main(["adamw", "lisa", "--model", "tiny", "--steps", "3", "--threads", "1", "--json", str(path)])
    printed = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert [entry["method"] for entry in written["races"]] == ["adamw", "lisa"]
    assert (written["model"], written["steps"], written["threads"]) == ("tiny", 3, 1)
    for entry in written["races"]:
        assert entry["memory_ratio"] == entry["our_peak_bytes"] / entry["their_peak_bytes"]
        assert entry["largest_difference"] == 0.0
        assert f"{entry['update_ratio']['median']:.3f} [" in printed
        assert all(f"- {entry['method']}: {note}" in printed for note in entry["notes"])
    assert code == int(any(entry["lost"] for entry in written["races"]))


def test_a_race_that_is_lost_is_named_and_the_command_fails(monkeypatch, capsys):
    slow = result(update=Ratio(1.5, 1.4, 1.6), peer="peer")
    monkeypatch.setattr(race, "run", lambda *args: slow)
    assert race.main(["adamw", "--model", "tiny", "--threads", "1"]) == 1
    printed = capsys.readouterr().out
    assert "LOST" in printed
    assert "update time 1.500 [1.400, 1.600] above 1.0" in printed


def test_a_race_that_fails_costs_no_other_its_numbers(monkeypatch, tmp_path, capsys):
    def runs(name, *given):
        if name == "sgd":
            raise torch.OutOfMemoryError("no memory left")
        return replace(result(), method=name)

    monkeypatch.setattr(race, "run", runs)
    path = tmp_path / "race.json"
    assert race.main(["adamw", "sgd", "hft", "--model", "tiny", "--threads", "1", "--json", str(path)]) == 1
    assert [one["method"] for one in json.loads(path.read_text())["races"]] == ["adamw", "hft"]
    printed = capsys.readouterr()
    assert "Failed: sgd" in printed.out and "no memory left" in printed.err


def test_a_peer_that_is_not_installed_is_skipped_and_said_so(monkeypatch, capsys):
    def missing(name):
        return None if name in ("badam", "lomo_optim") else importlib.util.find_spec(name)

    monkeypatch.setattr(races, "find_spec", missing)
    monkeypatch.setattr(parts, "find_spec", missing)
    monkeypatch.setattr(parts, "badam_backward", lambda *args, **kwargs: parts.Part("b", 0.4, 0.5, "0.4"))
    assert race.main(["badam", "lomo", "--model", "tiny", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "badam: skipped, badam 1.4 is not installed" in printed
    assert "lomo: skipped" in printed


@pytest.mark.parametrize("arguments", [["adam"], ["adamw", "--steps", "0"], ["adamw", "--model", "huge"]])
def test_what_the_command_does_not_know_ends_it(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        race.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_sides_meter_what_they_train():
    side = installed("adamw").sides(TINY)[0]
    assert isinstance(side, Side)
    weights = 4 * sum(p.numel() for p in side.model.parameters())
    assert side.peak_bytes(2) > 4 * weights  # weights, gradients and two moments at the least


def test_the_table_of_races_in_the_readme_is_that_of_the_results():
    page = seen.README.read_text(encoding="utf-8")
    assert seen.renewed(page) == page, "make it again: python -m benchmarks.seen"
    assert {name for one in seen.documents() for name in seen.names(one)} <= set(RACES)


def test_the_readme_names_the_peer_of_every_race_the_larger_limits_and_the_versions_that_the_extra_installs():
    page = seen.README.read_text(encoding="utf-8")
    table = page.partition("## Who races whom")[2].partition("## Measured separately")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"[\w-]+", cell)}
    assert named == set(RACES)
    larger = {name: f"{one.memory_limit:g}" for name, one in RACES.items() if one.memory_limit > 1}
    assert {name: limit for limit, name in re.findall(r"([\d.]+) for `([\w-]+)`", page)} == larger
    extra = next(line for line in (seen.HERE.parent / "pyproject.toml").read_text().splitlines() if "peers = " in line)
    assert {one for one in re.findall(r"[\w-]+==[\d.]+", page) if one not in extra} == set()


def test_a_race_taken_again_replaces_the_one_before(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{seen.BEGIN}old\n{seen.END}below\n", encoding="utf-8")
    monkeypatch.setattr(seen, "TAKEN", tmp_path / "races.json")
    monkeypatch.setattr(seen, "README", readme)
    (document,) = (one for one in json.loads((seen.HERE / "races.json").read_text()) if seen.names(one) == ("lora",))
    for number, median in enumerate((0.5, 0.75)):
        document["races"][0]["update_ratio"]["median"] = median
        (tmp_path / f"{number}.json").write_text(json.dumps(document))
        assert seen.main([str(tmp_path / f"{number}.json")]) == 0
    text = readme.read_text(encoding="utf-8")
    assert "| `lora` | 0.750 [" in text and "0.500" not in text and "old" not in text
    both = {**document, "races": [{**document["races"][0], "method": name} for name in ("lora", "vera")]}
    both["races"][0]["update_ratio"] = {"median": 0.875, "low": 0.8, "high": 0.9}
    (tmp_path / "both.json").write_text(json.dumps(both))
    for files, lora in ((["both.json"], "0.875"), (["1.json"], "0.750")):  # with another race, and alone again
        assert seen.main([str(tmp_path / file) for file in files]) == 0
        text = readme.read_text(encoding="utf-8")
        assert text.count("| `lora` |") == text.count("| `vera` |") == 1 and f"| `lora` | {lora} [" in text
    assert text.startswith("above\n") and text.endswith("below\n")
