"""What scikit-learn brings and fetches: its own data sets, and those of OpenML."""

import warnings
from pathlib import Path
from typing import Any

from dp_ilg.experiments.data.files import DataError


def fetch(
    title: str, name_version: tuple[str, int], data_dir: Path | None, advice: str
) -> Any:
    """Fetches a data set from OpenML, without pandas.

    Args:
        title: its name with us, for messages.
        name_version: its name and version with OpenML.
        data_dir: where it was looked for before, for messages.
        advice: which files would do instead, for messages.

    Returns:
        scikit-learn's bunch.

    Raises:
        DataError: where scikit-learn is absent, or OpenML cannot be asked.

    Example:
        >>> fetch("adult", ("adult", 0), None, "adult.npz")
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: adult is not given by a --data-dir ...
    """
    name, version = name_version
    options = dict(as_frame=False, parser="liac-arff", n_retries=1, delay=0.1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says what failed
            return sklearn_datasets().fetch_openml(name, version=version, **options)
    except DataError:
        raise
    except Exception as error:  # network, cache, checksum: no common base class
        reason = f" and OpenML could not be asked ({type(error).__name__})"
        raise DataError(absent(title, data_dir, reason, advice)) from error


def absent(title: str, data_dir: Path | None, reason: str, advice: str) -> str:
    """The sentence for data that is not there.

    Args:
        title: name of the data.
        data_dir: where it was looked for, if a folder was given.
        reason: what else was tried, to follow on "is not ...".
        advice: which files to get.

    Returns:
        One sentence.

    Example:
        >>> absent("adult", None, "", "adult.npz")
        'adult is not given by a --data-dir; get adult.npz and pass its folder as ...'
    """
    where = f"in {data_dir}" if data_dir else "given by a --data-dir"
    return (
        f"{title} is not {where}{reason}; get {advice} and pass its folder as "
        "--data-dir."
    )


def sklearn_datasets() -> Any:
    """Imports ``sklearn.datasets``.

    Returns:
        The module.

    Raises:
        DataError: where scikit-learn is not installed.

    Example:
        >>> sklearn_datasets().load_digits().images.shape
        (1797, 8, 8)
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            "This data set needs scikit-learn; install dp_ilg[experiments]."
        ) from error
    return datasets
