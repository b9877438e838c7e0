"""The goals: ratios that a run has to reach (must) and works for (aim)."""

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.contestants import ADAM
from benchmarks.contestants import ADAM_MINI
from benchmarks.contestants import ADAMW
from benchmarks.contestants import FLOAT32
from benchmarks.contestants import FLOOR
from benchmarks.contestants import INT8
from benchmarks.contestants import MUON
from benchmarks.contestants import Contestant
from benchmarks.contestants import momentum


@dataclass(frozen=True)
class Goal:
    """A bound on ratios.

    Args:
        name: What is divided by what.
        must: What every ratio has to reach.
        aim: What to work for; `None` if there is no more to reach.
    """

    name: str
    must: float
    aim: float | None = None


class Verdict(NamedTuple):
    """The ratios of one goal, judged by the worst."""

    goal: Goal
    best: float
    worst: float
    worst_name: str

    @property
    def word(self) -> str:
        if self.worst > self.goal.must:
            return "fail"
        if self.goal.aim is None or self.worst > self.goal.aim:
            return "must"
        return "aim"


def judge(goal: Goal, ratios: Mapping[str, float]) -> Verdict:
    worst = max(ratios, key=lambda name: ratios[name])
    return Verdict(goal, min(ratios.values()), ratios[worst], worst)


def step_goals(model: str) -> list[tuple[Goal, str, str]]:
    """Each goal of a step with its mode and the name of the reference."""
    resnet = model == "resnet50"
    return [
        (Goal("compiled / Keras Adam", 0.78, 0.55), "compiled", ADAM),
        (
            Goal("compiled / fused AdamW", 1.7 if resnet else 1.3, 0.9),
            "compiled",
            ADAMW,
        ),
        (
            Goal("compiled / adam_mini", 0.85 if resnet else 0.45, 0.35),
            "compiled",
            ADAM_MINI,
        ),
        (
            Goal("compiled / 20-byte floor", 2.4 if resnet else 1.7, 1.2),
            "compiled",
            FLOOR,
        ),
        (Goal("compiled / Keras Muon", 1.0, 0.5), "compiled", MUON),
        (Goal("tf.function / Keras Adam", 0.45, 0.25), "graph", ADAM),
        (Goal("eager apply / Keras Adam", 0.15, 0.10), "eager", ADAM),
    ]


def judge_steps(
    model: str, seconds: Mapping[Contestant, float]
) -> list[Verdict]:
    """The goals whose reference took part, of float32 but for the last."""
    verdicts = []
    wide = [c for c in seconds if c.is_ours and momentum(c.name) == FLOAT32]
    for goal, mode, reference in step_goals(model):
        divisor = seconds.get(Contestant(reference, mode))
        ours = [c for c in wide if c.mode == mode]
        if divisor and ours:
            ratios = {c.name: seconds[c] / divisor for c in ours}
            verdicts.append(judge(goal, ratios))
    ratios = {}
    for contestant in wide:
        int8 = contestant._replace(name=f"{contestant.name} {INT8}")
        if int8.mode == "compiled" and int8 in seconds:
            ratios[int8.name] = seconds[int8] / seconds[contestant]
    if ratios:
        verdicts.append(judge(STEP_INT8, ratios))
    return verdicts


STEP_INT8 = Goal("compiled, int8 / float32 momentum", 1.3, 1.0)
FIT = Goal("model.fit / Keras Adam", 1.0, 0.9)
STATE = Goal("state / Adam's bytes", 0.505)
STATE_BFLOAT16 = Goal("state in bfloat16 / Adam's", 0.26)
STATE_INT8 = Goal("state in int8 / Adam's", 0.135)
PEAK = Goal("peak of a step / parameters", 0.25, 0.05)
PEAK_INT8 = Goal("peak of a step in int8 / parameters", 0.1)
FIRST_CALL = Goal("first call / Keras Adam's", 2.0, 1.2)
LINEAR = Goal("first call, growth / linear growth", 1.0)
FIRST_STEP = Goal("first eager step / Keras Adam's", 2.0)
FIRST_FIT = Goal("first fit, processor / Keras Adam's", 1.15)
FIRST_FIT_BYTES = Goal("first fit, memory / Keras Adam's", 1.5)
EQUAL_MODELS = Goal("equal models, memory / Keras Adam's", 1.1)
NO_PROGRAM = Goal("equal models, compiled programs", 0.0)
OTHER_LAYERS = Goal("steps of other layers / Keras Adam's", 2.0)
SHAPES = Goal("worst shape / Keras Adam", 1.1, 0.8)
MANY = Goal("200 variables of 100 / Keras Adam", 1.0, 0.5)
TORCH_STEP = Goal("step with PyTorch / Keras Adam", 1.2)
TEXT_IN_8_BITS = Goal("int8 - float32 momentum, nats", 0.01)
DIGITS_IN_8_BITS = Goal("int8 - float32 momentum, % wrong", 0.2)
REPLICAS = Goal("two replicas / Keras Adam", 0.6, 0.4)


def as_data(verdicts: Iterable[Verdict]) -> list[dict[str, object]]:
    return [
        {
            "goal": verdict.goal.name,
            "must": verdict.goal.must,
            "aim": verdict.goal.aim,
            "best": verdict.best,
            "worst": verdict.worst,
            "worst of": verdict.worst_name,
            "reached": verdict.word,
        }
        for verdict in verdicts
    ]
