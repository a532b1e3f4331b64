"""The secret keys of a run, derived from everything that its noise must not outlive.

Two releases with one noise and two clipped sums give the difference of the sums away,
without noise. So keys follow the seed *and* the plan, the configuration, the training
data and the code: runs that could release different sums draw different noise.

Reference: RFC 7693 (BLAKE2b), keyed and personalised.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dp_ilg.experiments.config.report import ReportConfig
from dp_ilg.experiments.config.schema import Config, config_to_toml
from dp_ilg.experiments.runs.job import Job
from dp_ilg.training.environment import code_digest
from dp_ilg.training.run_secret import derived_secret, secret_from, typed_key

SCHEME = "seed, plan, configuration, data, code"


class RunKeys(NamedTuple):
    """The secret keys of a run: who has them can subtract the noise.

    Attributes:
        params: draws the initial parameters; follows the seed alone.
        sampler: draws the batches.
        optimizer: draws the noise of scores and gradients.

    Example:
        >>> derived_keys(0, {}).sampler.shape
        ()
    """

    params: Any
    sampler: Any
    optimizer: Any


def identity(job: Job, config: Config | None = None) -> dict[str, str]:
    """What a checkpoint must share with the run that resumes it.

    Args:
        job: the run, before its inputs are projected.
        config: of the run, where the job is shared by several; by default the job's.

    Returns:
        Digests of the plan, of the configuration (the seed apart, and the report, which
        decides no release), of the training data and of code from outside: the same
        noise on other data, or by other code, would release their difference.

    Privacy:
        The digest of the data is as secret as the keys beside it: it stays in the
        checkpoints.

    Example:
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> sorted(identity(build_job(Config())))
        ['configuration', 'data', 'plan']
    """
    deciding = dataclasses.replace(config or job.config, report=ReportConfig())
    text = config_to_toml(deciding)
    return {
        "plan": job.plan.digest(),
        "configuration": hashlib.sha256(text.encode()).hexdigest()[:16],
        "data": job.data_digest,
        **job.outside,
    }


def run_keys(job: Job, seed: int | None, code: str | None = None) -> RunKeys:
    """The keys of a run.

    Args:
        job: the run, before its inputs are projected.
        seed: a whole number below 2**256, or None for keys from the operating system.
        code: `code_digest` of where the run was begun; by default of here.

    Returns:
        `derived_keys` from the seed and all that `identity` and the code say.

    Raises:
        ValueError: for a seed out of range.

    Privacy:
        Runs under one secret seed are as independent as the hash is random, unless they
        are the same run: then they release the same bits. A seed that can be guessed
        voids the guarantee against whoever guesses it; use one for tests and
        comparisons only. JAX's keys have 64 bits.

    Example:
        >>> from dp_ilg.experiments.config.schema import PrivacyConfig
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> one, other = (
        ...     build_job(Config(privacy=PrivacyConfig(epsilon=e))) for e in (1.0, 2.0))
        >>> bool((run_keys(one, 7).optimizer == run_keys(other, 7).optimizer).all())
        False
        >>> bool((run_keys(one, 7).optimizer == run_keys(one, 7).optimizer).all())
        True
    """
    return derived_keys(seed, identity(job) | {"code": code or code_digest()})


def noise_secret(job: Job, seed: int | None) -> str:
    """The secret of a run's exact noise, derived as its keys are, or drawn.

    Args:
        job: the run, before its inputs are projected.
        seed: as for `run_keys`.

    Returns:
        64 hexadecimal digits: 256 bits.

    Raises:
        ValueError: for a seed out of range.

    Privacy: as `run_keys`; with a seed it is as guessable as that.

    Example:
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> job = build_job(Config())
        >>> len(noise_secret(job, None)), noise_secret(job, 1) == noise_secret(job, 1)
        (64, True)
    """
    facts = identity(job) | {"code": code_digest()}
    return derived_secret(secret_from(seed), "exact noise", facts).hex()


def check_keys(
    job: Job, facts: Mapping[str, Any], sampler_key: Any, folder: Path
) -> None:
    """Refuses another seed, and keys under which another run may have drawn.

    Args:
        job: the run that is resumed, before its inputs are projected.
        facts: of its checkpoint.
        sampler_key: in that checkpoint.
        folder: of the run, for messages.

    Raises:
        ValueError: if the keys follow the seed alone, as they did
            before the plan was part of them; or if the job's seed is not the folder's.

    Privacy:
        Keys of an older folder that came from the operating system are nobody else's,
        so such a run may go on.

    Example:
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> job = build_job(Config())
        >>> check_keys(job, {"seed_fixed": False}, None, Path("runs/old"))
        >>> check_keys(job, {"seed_fixed": True}, None, Path("runs/old"))
        Traceback (most recent call last):
        ValueError: The run folder runs/old was begun by an older version, whose keys \
follow the seed alone, so that another run under that seed may have the same noise; \
begin a new run folder.
    """
    known, seed = facts.get("keys"), job.config.run.seed
    if known is None and facts["seed_fixed"]:
        raise ValueError(
            f"The run folder {folder} was begun by an older version, whose keys follow "
            "the seed alone, so that another run under that seed may have the same "
            "noise; begin a new run folder."
        )
    code = (known or {}).get("code")
    if seed is not None and not (sampler_key == run_keys(job, seed, code).sampler):
        raise ValueError(
            "--seed is not the one this run was begun with; leave it out, the run "
            "folder holds the keys."
        )


def program_digest(job: Job) -> str:
    """A digest of all that decides a step's release besides parameters and keys.

    Args:
        job: the run, ready to train.

    Returns:
        64 hexadecimal digits, of `identity` and `code_digest`.

    Privacy:
        The training data are in it: only a hash of it under a key may be written where
        others read.

    Example:
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> len(program_digest(build_job(Config())))
        64
    """
    facts = identity(job) | {"code": code_digest()}
    return hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()


def derived_keys(seed: int | None, facts: Mapping[str, str]) -> RunKeys:
    """Derives three keys from a seed and facts, or draws them.

    Args:
        seed: a whole number below 2**256, or None for 256 bits from the operating
            system.
        facts: what the keys are for; other facts, other batches and noise.

    Returns:
        Keys that have nothing to do with each other. Initial parameters see no data and
        no noise, so their key leaves the facts out: runs under one seed start alike and
        can be compared in pairs.

    Raises:
        ValueError: for a seed out of range.

    Privacy:
        As `run_keys`.

    Example:
        >>> bool((derived_keys(1, {}).sampler == derived_keys(1, {}).sampler).all())
        True
        >>> bool((derived_keys(None, {}).sampler == derived_keys(None, {}).sampler))
        False
    """
    secret = secret_from(seed)
    return RunKeys(
        typed_key(derived_secret(secret, "params", {})),
        typed_key(derived_secret(secret, "sampler", facts)),
        typed_key(derived_secret(secret, "optimizer", facts)),
    )
