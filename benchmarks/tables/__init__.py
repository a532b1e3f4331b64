"""Tables of the documentation, made from benchmarks/results by docs_tables.py.

`TABLES` has one row a table: the name that stands in its marker, and a function of the
lines. `pages` finds the markers and puts the tables there.
"""

from tables import (
    best,
    commands,
    correlated,
    costs,
    front,
    papers,
    speed,
    studies,
    thresholds,
    trust,
    utility,
)
from tables.lines import Table

TABLES: dict[str, Table] = {
    "why": front.why,
    # docs/results.md
    "best": best.best,
    "by-source": best.by_source,
    "imdb": utility.imdb,
    "embeddings": utility.embeddings,
    "flight-rules": utility.flight_rules,
    "scattering": utility.scattering,
    "cnns": utility.cnns,
    "small": utility.small,
    "digits-methods": utility.digits_methods,
    "next-words": utility.next_words,
    "encoders": utility.encoders,
    "frozen": utility.frozen,
    "metric-band": utility.metric_band,
    "layers": studies.layers,
    # docs/correlated.md
    "correlated-noise": correlated.noise,
    "correlated-weights": correlated.weights,
    "correlated-time": correlated.seconds,
    "correlated-accuracy": correlated.accuracy,
    # docs/choosing.md
    "questions": studies.questions,
    "exponents": studies.exponents,
    "scores": studies.scores,
    "rules": thresholds.rules,
    "error-bar": thresholds.error_bar,
    "settings": studies.settings,
    "step-count": studies.step_count,
    "clip-norm": studies.clip_norm,
    # docs/guides/priors_and_probes.md
    "free-sources": thresholds.free_sources,
    # docs/speed.md
    "gradients": speed.gradients,
    "steps": speed.steps,
    "resident": speed.resident,
    "contestants": speed.contestants,
    "growth": speed.growth,
    "lots": costs.lots,
    "fine-tuning": costs.fine_tuning,
    "noise-cost": costs.noise_cost,
    "maps": costs.maps,
    "noise-density": costs.noise_density,
    "exactness-time": costs.exactness_time,
    "exactness-accuracy": costs.exactness_accuracy,
    "embedding": costs.embedding,
    "kept_rows": costs.kept_rows,
    "waiting": costs.waiting,
    "scaling": costs.scaling,
    "front-door": costs.front_door,
    "roofline": costs.roofline,
    # docs/papers.md
    "abadi": papers.abadi,
    "abadi-accounting": papers.abadi_accounting,
    "published": papers.published,
    "attack": papers.attack,
    # docs/accounting.md
    "accounting": trust.accounting,
    "truncation": trust.truncation,
    "oracle": trust.oracle,
    "filters": studies.filters,
    "filter-noise": studies.filter_noise,
    # docs/audits.md
    "trainer-bounds": trust.trainer_bounds,
    "trainer-checks": trust.trainer_checks,
    "sensitivity": trust.sensitivity,
    "kills": trust.kills,
    "fuzz": trust.fuzz,
    # docs/command_line.md
    "train": commands.train,
    "train-shorts": commands.shorts,
    **{f"fields-{name}": commands.section(name) for name in commands.SECTIONS},
    **{f"flags-{name}": commands.flags(name) for name in commands.COMMANDS},
}
