"""Who answers for a run and where it is shown: a section that decides nothing."""

from dataclasses import dataclass
from typing import Annotated

from dp_ilg.experiments.config.run import flag


@dataclass(frozen=True)
class ReportConfig:
    """What the report says besides the run, and where else it is shown.

    Nothing here decides a release: a run is resumed, and keeps its keys, whatever
    stands here. `responsible` and `contact` are printed as they are. `tensorboard`
    writes event files beside ``metrics.jsonl`` (extra `tensorboard`).

    Privacy:
        Names are published with the page.

    Example:
        >>> ReportConfig().responsible
        ''
    """

    responsible: str = ""
    contact: str = ""
    tensorboard: Annotated[bool, flag("--tensorboard")] = False
