"""What the lines of step.jsonl say, read for tables and figures.

Each line holds rounds in which every contestant of one model took turns, so the ratio
to the ordinary step over the whole batch belongs to its round, and later rounds count
over earlier ones. dp_ilg and the ordinary step count under the newest label of a model
only; other libraries, which our changes do not touch, under any.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tables.lines import Record

ORDINARY = ("ordinary", "ordinary_unrolled", "torch_ordinary")
OURS = ("auto", "auto_uniform", "bookkeeping")
_OF_LABEL = (*ORDINARY, *OURS)
MODELS = {  # row of benchmarks/speed/step.py -> plain name
    "mlp": "MLP",
    "mnist_cnn": "MNIST CNN",
    "cifar_cnn": "CIFAR CNN",
    "lm_d128": "LM, width 128",
    "lm_v10k": "LM, 10,000 words",
    "lm_d256": "LM, width 256",
    "resnet18": "ResNet-18",
    "lstm": "LSTM",
    "vit": "ViT",
    "no_fast_path": "weight norm",
}
CONTESTANTS = {  # family -> plain name
    "auto": "dp_ilg",
    "vmap": "plain vmap",
    "jax_privacy": "jax-privacy",
    "optax": "optax.contrib",
    "opacus_ghost": "Opacus, ghost clipping",
    "opacus_hooks": "Opacus, hooks",
}
Facts = dict[str, Any]


class Timing(NamedTuple):
    """The contestants of one model, of one kind ("gradient" or "step")."""

    batch_size: int
    contestants: Mapping[str, Facts]

    def ordinary(self) -> Facts:
        """The fastest ordinary variant."""
        own = [v for k, v in self.contestants.items() if family(k) in ORDINARY]
        return min(own, key=_ratio)

    def whole(self) -> Facts:
        """The ordinary variant over the whole batch."""
        names = {f"{of}/{self.batch_size}" for of in ORDINARY}
        return next(v for k, v in self.contestants.items() if k in names)

    def best(self, of: str) -> Facts | None:
        """The fastest variant of a contestant, or None if none was timed."""
        own = [v for k, v in self.contestants.items() if family(k) == of]
        return min(own, key=_ratio) if own else None

    def over_best(self, of: str) -> float | None:
        """Its time over the best ordinary one."""
        found = self.best(of)
        return None if found is None else _ratio(found) / _ratio(self.ordinary())


def _ratio(facts: Facts) -> float:
    return facts["over_full_batch"]


def family(variant: str) -> str:
    """`ordinary/64` is of the family `ordinary`."""
    return variant.split("/")[0]


def timings(
    records: Sequence[Record], kind: str, framework: str = "jax"
) -> dict[str, Timing]:
    """What was timed of every model, by row of the benchmark."""
    records = [r for r in records if r["framework"] == framework]
    newest = {record["row"]: record["label"] for record in records}
    sizes: dict[str, int] = {}
    found: dict[str, dict[str, Facts]] = {}
    for record in records:
        if record["kind"] != kind:
            continue
        row = record["row"]
        sizes[row] = record["batch_size"]
        for variant, facts in record["contestants"].items():
            old = family(variant) in _OF_LABEL and record["label"] != newest[row]
            if "error" in facts or old or "over_full_batch" not in facts:
                continue
            found.setdefault(row, {})[variant] = facts
    return {row: Timing(sizes[row], of) for row, of in found.items()}
