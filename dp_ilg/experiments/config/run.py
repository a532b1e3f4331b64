"""How a run is carried out: the section of a configuration that guarantees nothing."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from dp_ilg.validation import positive, whole


def flag(name: str) -> Any:
    """Lets a dotted field also answer to the short flag `name`.

    Example:
        >>> flag("--seed").aliases
        ('--seed',)
    """
    return tyro.conf.arg(aliases=(name,))


@dataclass(frozen=True)
class RunConfig:
    """How the run is carried out; nothing here changes the guarantee but `seed`.

    Privacy:
        Who knows the seed can subtract the noise. Left out, the keys come from the
        operating system and only the checkpoints hold them.

    `memory_mib` bounds what a gradient holds beside the model and the gathered rows:
    the largest micro-batch that fits is taken, unless `microbatch_size` is given.
    `chunk_size` rows are gathered at a time, by default a whole draw. `compile_cache`
    is a folder in which compiled programs are kept for the next start.

    Example:
        >>> RunConfig().seed is None
        True
    """

    seed: Annotated[int | None, flag("--seed")] = None
    eval_every: int = 25
    checkpoint_every: int = 100
    microbatch_size: int | None = None
    memory_mib: float | None = None
    chunk_size: int | None = None
    engine: str = "auto"
    compile_cache: str | None = None
    unprotected_train_loss: Annotated[bool, flag("--unprotected-train-loss")] = False

    def __post_init__(self):
        if self.seed is not None:
            whole("run.seed", self.seed, 0)
        whole("run.eval_every", self.eval_every)
        whole("run.checkpoint_every", self.checkpoint_every)
        for name in ("microbatch_size", "chunk_size"):
            if getattr(self, name) is not None:
                whole(f"run.{name}", getattr(self, name))
        if self.memory_mib is not None:
            positive("run.memory_mib", self.memory_mib)
