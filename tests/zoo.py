"""Every kind of loss an engine must be exact on: name to a function that makes it."""

from __future__ import annotations

from collections.abc import Callable

from tests import zoo_control, zoo_linear, zoo_models, zoo_params
from tests.zoo_core import Case

_PARTS = [zoo_linear, zoo_params, zoo_control, zoo_models]
ZOO: dict[str, Callable[[], Case]] = {
    name: make for part in _PARTS for name, make in part.CASES.items()
}
if len(ZOO) != sum(len(part.CASES) for part in _PARTS):
    raise ValueError("two parts of the zoo use one name")
