"""The schema of a record: the one list of its fields.

A run that went wrong is a result too, so its record has the same fields. What it could not measure any more is null,
and only there may a measured field be null.
"""

from typing import Any, NamedTuple

from reports.parts import PARTS

VERSION = 1
STATUSES = ("ok", "failed", "out_of_memory", "diverged")

# When may a field be null?
NEVER = "never"
UNLESS_OK = "unless ok"  # only in a record whose status isn't "ok"
ALWAYS = "always"
OPTIONAL = "optional"  # null or missing


LARGEST = 2**63 - 1  # of whole numbers: bytes and counts of any machine are far below
ANY = 1e150  # of scores and losses: their squares are numbers, too


class Field(NamedTuple):
    """One row of the schema. In a path, `[]` stands for every item of a list and `*` for every value of an object.

    Attributes:
        comment: the unit, or what it is.
        least, most: bounds of a number, which may be one or the other.
        missing: what a record that lacks the field means by that.
        apart: of the training: are runs that differ in it of different set-ups, which have tables of their own?
    """

    path: str
    types: tuple[type, ...]
    null: str
    comment: str
    least: float = 0
    most: float = LARGEST
    missing: Any = None
    apart: bool = True

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]


def _parts(place: str) -> list[Field]:
    null = {False: UNLESS_OK, True: OPTIONAL}
    return [Field(f"memory.{place}.{part.field}", (int,), null[part.later], "bytes", missing=0) for part in PARTS]


SCHEMA: tuple[Field, ...] = (
    Field("schema", (int,), NEVER, f"version of this table, {VERSION} today"),
    Field("run_id", (str,), NEVER, "<task>--<method>--<model>--s<seed>--<hash>, also the file's name"),
    Field("status", (str,), NEVER, " | ".join(STATUSES)),
    Field("error", (str,), ALWAYS, "the text of what went wrong; null if and only if the status is ok"),
    Field("task", (str,), NEVER, "superglue/rte, or package.module:Task"),
    Field("method", (str,), NEVER, "a name of the registry of optimizers, or package.module:Class"),
    Field("model", (str,), NEVER, "config:NAME (random weights), an id of the hub, or a folder"),
    Field("seed", (int,), NEVER, "of weights, batches and method"),
    Field("hyperparameters", (dict,), NEVER, "every one of the method's, resolved; later additions where used"),
    Field("training", (dict,), NEVER, "what every method of a comparison shares"),
    Field(
        "training.steps",
        (int,),
        UNLESS_OK,
        "updates (null if the run failed before epochs became steps)",
        1,
        apart=False,
    ),
    Field("training.batch_size", (int,), NEVER, "examples an update", 1),
    Field("training.sequence_length", (int,), NEVER, "tokens an example, at most", 1),
    Field("training.gradient_accumulation_steps", (int,), NEVER, "micro-batches an update", 1),
    Field("training.dtype", (str,), NEVER, "of the weights"),
    Field("training.autocast", (str, bool), ALWAYS, "dtype of autocast; false or null without"),
    Field("training.schedule", (str,), NEVER, "of the learning rate"),
    Field("training.warmup_fraction", (float,), NEVER, "share of the steps", 0, 1),
    Field("training.max_grad_norm", (float,), ALWAYS, "clipping by the loop; null without", most=ANY),
    Field("training.gradient_checkpointing", (bool,), NEVER, "of every layer"),
    Field("training.checkpointing_every", (int,), OPTIONAL, "only every Nth layer", 1, missing=1),
    Field("training.loss_chunks", (int,), OPTIONAL, "pieces of the sequence that logits are computed in", 1, missing=1),
    Field("training.offload_activations", (bool,), OPTIONAL, "to the host, till the backward pass", missing=False),
    Field("training.data", (str,), NEVER, "demo | hub | a folder"),
    Field("training.weights", (str,), NEVER, "random | pretrained"),
    Field("training.profile", (str,), ALWAYS, "demo | paper"),
    Field("training.evaluate_every", (int,), ALWAYS, "steps; null: at the end only", 1, apart=False),
    Field(
        "training.final_fraction", (float,), OPTIONAL, "of the learning rate, at the schedule's end", 0, 1, missing=0.0
    ),
    Field("training.processes", (int,), OPTIONAL, "that made the run together", 1, missing=1),
    Field("training.strategy", (str,), OPTIONAL, "of several processes: fsdp2 | replicate", missing="fsdp2"),
    Field("training.evaluate_before", (bool,), OPTIONAL, "also before the first step", missing=False, apart=False),
    Field("training.track", (str,), OPTIONAL, "what else the history has: gradient_norm", apart=False),
    Field("training.options", (dict,), OPTIONAL, "of the task: those that were given", missing={}),
    Field("parameters", (int,), UNLESS_OK, "of the model as built, adapters left out"),
    Field("trainable_parameters", (int,), UNLESS_OK, "what the method may ever train"),
    Field("trained_fraction", (float,), ALWAYS, "share of the weights that changed; null where not compared", 0, 1),
    Field("block_coverage", (float,), ALWAYS, "share of the blocks visited; null for a method without blocks", 0, 1),
    Field("metrics", (dict,), UNLESS_OK, "the task's, at the end"),
    Field("metrics.*", (float,), UNLESS_OK, "as the task's own scale has it", -ANY, ANY),
    Field("metrics.loss_standard_error", (float,), OPTIONAL, "of the loss, over sequences", most=ANY),
    Field(
        "metrics.loss_change_standard_error",
        (float,),
        OPTIONAL,
        "of its difference from that before the first step, over the same sequences",
        most=ANY,
    ),
    Field("initial_metrics", (dict,), OPTIONAL, "the task's, before the first step; null where that wasn't wanted"),
    Field("initial_metrics.*", (float,), UNLESS_OK, "as the task's own scale has it", -ANY, ANY),
    Field("benchmarks", (dict,), OPTIONAL, "by lm-evaluation-harness after training, by its names of tasks"),
    Field("benchmarks.*", (dict,), NEVER, "a task, or a group of them"),
    Field("benchmarks.*.scores", (dict,), NEVER, "by metric, with the filter of answers where there is one"),
    Field("benchmarks.*.scores.*", (float,), NEVER, "as the benchmark's own scale has it", -ANY, ANY),
    Field("benchmarks.*.standard_errors", (dict,), NEVER, "by metric, of those that have one"),
    Field("benchmarks.*.standard_errors.*", (float,), NEVER, "on the scale of the score", 0, ANY),
    Field("benchmarks.*.fewshot", (int,), ALWAYS, "examples in the prompt; null where a group's tasks differ"),
    Field("benchmarks.*.limit", (int,), ALWAYS, "documents of each task, at most; null: all", 1),
    Field("benchmarks.*.chat_template", (bool,), NEVER, "asked as in a chat"),
    Field("benchmarks.*.version", (str,), ALWAYS, "of the harness's task"),
    Field("benchmarks.*.harness", (str,), NEVER, "version of lm-eval"),
    Field("headline", (str,), UNLESS_OK, "the metric that tables rank by"),
    Field("higher_is_better", (bool,), UNLESS_OK, "whether more of the headline is better"),
    Field("validation_examples", (int,), OPTIONAL, "that the headline is taken on: texts, questions, sequences", 1),
    Field(
        "constant_score",
        (float,),
        OPTIONAL,
        "the headline of guessing: the best constant answer, or all tokens alike",
        -ANY,
        ANY,
    ),
    Field("history", (list,), NEVER, "in the order of the steps"),
    Field("history[]", (dict,), NEVER, "a step that was reported"),
    Field("history[].step", (int,), NEVER, "updates done, from 1", 1),
    Field("history[].tokens", (int,), NEVER, "seen since the start, padding left out"),
    Field("history[].seconds", (float,), NEVER, "of training alone, since the start"),
    Field(
        "history[].loss",
        (float,),
        UNLESS_OK,
        "mean since the entry before; null where not finite",
        -ANY,
        ANY,
    ),
    Field("history[].learning_rate", (float,), NEVER, "of the first group", most=ANY),
    Field("history[].gradient_norm", (float,), OPTIONAL, "of all weights, if tracked; null if not finite", most=ANY),
    Field("history[].metrics", (dict,), OPTIONAL, "only where it was evaluated"),
    Field("memory", (dict,), UNLESS_OK, "of training, never of evaluation"),
    Field("memory.peak_allocated_bytes", (int,), UNLESS_OK, "bytes, raw: not rounded as an allocator would", 1),
    Field("memory.at_peak", (dict,), UNLESS_OK, "what there is at the moment of the peak: adds up to it"),
    *_parts("at_peak"),
    Field("memory.maximum", (dict,), UNLESS_OK, "the same parts, each at its own maximum: don't add up"),
    *_parts("maximum"),
    Field(
        "memory.peak_reserved_bytes",
        (int,),
        ALWAYS,
        "bytes, of the GPU's allocator, also for evaluations on the way; null without one",
    ),
    Field("memory.process_peak_bytes", (int,), ALWAYS, "bytes, resident; null where the system doesn't say"),
    Field("memory.peak_phase", (str,), OPTIONAL, "forward | backward | update | switch"),
    Field("memory.peak_selection", (str,), OPTIONAL, "what was trained at the peak, in words"),
    Field("memory.peak_module", (str,), OPTIONAL, "the module that holds most at the peak"),
    Field("memory.components", (dict,), OPTIONAL, "bytes by component of the model (embeddings, attention, ...)"),
    Field("parallel", (dict,), OPTIONAL, "of a run on several processes; memory is that of the one with most"),
    Field("parallel.processes", (int,), NEVER, "ranks", 1),
    Field("parallel.strategy", (str,), NEVER, "fsdp2 | replicate"),
    Field("parallel.sent_bytes", (float,), OPTIONAL, "bytes that a rank gives to collectives in a step, mean"),
    Field("parallel.peaks_bytes", (list,), OPTIONAL, "peak_allocated_bytes of each rank"),
    Field("parallel.peaks_bytes[]", (int,), NEVER, "bytes", 1),
    Field("made_by", (list,), OPTIONAL, "of a run that went on in another way, with times of the last alone"),
    Field("made_by[]", (dict,), NEVER, "what made some of the steps, one after another"),
    Field("made_by[].processes", (int,), NEVER, "ranks", 1),
    Field("made_by[].strategy", (str,), NEVER, "of several processes: fsdp2 | replicate"),
    Field("made_by[].device_name", (str,), OPTIONAL, "what device it was"),
    Field("made_by[].jobs", (int,), OPTIONAL, "runs at a time on that device", 1),
    Field("made_by[].steps", (int,), NEVER, "updates that they made"),
    Field("made_by[].tokens", (int,), NEVER, "seen in these, padding left out"),
    Field("made_by[].train_seconds", (float,), NEVER, "seconds that these took"),
    Field("time", (dict,), UNLESS_OK, "of training without metering"),
    Field("time.train_seconds", (float,), UNLESS_OK, "seconds of all steps"),
    Field("time.evaluation_seconds", (float,), UNLESS_OK, "seconds"),
    Field("time.tokens_per_second", (float,), UNLESS_OK, "tokens a second of training, padding left out"),
    Field("time.forward_seconds", (float,), UNLESS_OK, "seconds, median of a step"),
    Field("time.backward_seconds", (float,), UNLESS_OK, "seconds, median of a step"),
    Field("time.update_seconds", (float,), UNLESS_OK, "seconds, median of a step"),
    Field(
        "time.waited_seconds",
        (float,),
        OPTIONAL,
        "thread-seconds in which it (of ranks, one) was ready to run but all processors were taken; null: unknown",
    ),
    Field("time.timed_steps", (int,), OPTIONAL, "that the medians are over"),
    Field(
        "time.step_spread",
        (float,),
        OPTIONAL,
        "between the quartiles of a step's seconds, a share of the median",
        most=ANY,
    ),
    Field("environment", (dict,), NEVER, "versions, device, threads, commit, revisions, created (UTC): any of them"),
    Field("environment.device", (str,), OPTIONAL, "cpu | cuda"),
    Field("environment.device_name", (str,), OPTIONAL, "of the processor or the card"),
    Field("environment.threads", (int,), OPTIONAL, "of the CPU"),
    Field(
        "environment.jobs", (int,), OPTIONAL, "runs at a time on the device: above 1, times tell nothing", 1, missing=1
    ),
    Field("environment.memory_budgets", (list,), OPTIONAL, "bytes, that a study recommends a method for each of"),
    Field("environment.memory_budgets[]", (int,), NEVER, "bytes"),
    Field("environment.created", (str,), OPTIONAL, "ISO 8601, UTC"),
)


TRAINING = tuple(field for field in SCHEMA if field.path.startswith("training."))  # what runs of a comparison share
_MEANT = {field.name: field.missing for field in TRAINING}


def training(record: dict[str, Any]) -> dict[str, Any]:
    """A record's training, with what is meant by each field that it lacks, and what else it has."""
    given = record["training"]
    known = {name: missing for name, missing in _MEANT.items() if given.get(name) is None}
    return {**given, **known}


def unmeasured() -> dict[str, Any]:
    """The fields at the top of a record as they are before anything was measured."""
    fields = [field for field in SCHEMA if field.path.isidentifier() and field.null != OPTIONAL]
    return {field.path: [] if list in field.types else None for field in fields}


def below(section: str) -> list[str]:
    """The names of the fields of a section that a record of a run that is ok has."""
    fields = [field for field in SCHEMA if field.path == f"{section}.{field.name}" and field.null != OPTIONAL]
    return [field.name for field in fields]
