"""Scaling laws of mixtures of experts, and the dense model that an MoE equals.

Forms of the loss L, with N the active parameters, P the total, D the tokens, E the experts of a layer, G the
granularity (how many times smaller an expert is than the dense feed-forward layer), S = 1 - N / P the sparsity:

- `bilinear`: log10 L = a log10 N + b log10 E + c log10 N log10 E + d, runs of one number of tokens (Clark et al. 2022,
  "Unified Scaling Laws for Routed Language Models", equation 1). `saturated` has Ê in the place of E,
  1/Ê = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1/E_max (their equation 2).
- `granularity`: L = c + (g / G^γ + a) / P^α + b / D^β, runs of one ratio P / N (Krajewski et al. 2024, "Scaling Laws
  for Fine-Grained Mixture of Experts"), and L = c' + a' / N^α' + b' / D^β' for the dense runs.
- `sparsity`: L = e + a / P^α + b / D^β + c / (1 - S)^λ + d / ((1 - S)^δ P^γ) (Abnar et al. 2025, "Parameters vs FLOPs:
  Scaling Laws for Optimal Sparsity for Mixture-of-Experts Language Models").
- `leverage`: L = e + a / N_eff^α + b / D^β with N_eff = N (P / N)^κ, κ = k0 + k1 log(C / C0) + k2 log G + k3 (log G)²,
  C = 6 N D (after the efficiency leverage of Tian et al. 2025, "Towards Greater Leverage"). A dense run has N_eff = N,
  so dense and MoE runs share one law.

The dense equivalent N_eff of an MoE solves L_moe(N, P, D) = L_dense(N_eff, D). Its efficiency leverage is
EL = N_eff / N.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from scipy.optimize import least_squares, nnls

from qwen_jax.errors import InputError
from train.scaling.runs import compute

Array: TypeAlias = np.ndarray
MoeForm: TypeAlias = Literal["bilinear", "saturated", "granularity", "sparsity", "leverage"]
FORMS: tuple[MoeForm, ...] = ("bilinear", "saturated", "granularity", "sparsity", "leverage")

# A run is dense where its total size is its active size, to this relative precision.
_DENSE = 1e-3
# Sizes, tokens and ratios that differ by less than this factor are one value.
_SAME = 1.02
# Starts of the search over exponents.
_STARTS = 12


@dataclasses.dataclass(frozen=True)
class MoeRuns:
    """Runs of dense and MoE models, one value a run.

    Attributes:
      active: parameters that a token uses.
      total: all parameters; equal to `active` for a dense run.
      tokens: training tokens.
      loss: final loss in nats per token.
      experts: experts of an MoE layer; 1 for a dense run. Only `bilinear` and `saturated` read it.
      granularity: size of the dense feed-forward layer / size of an expert; 1 where nothing is said.
    """

    active: Array
    total: Array
    tokens: Array
    loss: Array
    experts: Array
    granularity: Array

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def dense(self) -> Array:
        """Which runs are dense."""
        return self.total <= self.active * (1 + _DENSE)

    def take(self, which: Array) -> "MoeRuns":
        """Some of the runs, by places or by a mask."""
        return MoeRuns(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))


def moe_runs(
    active: Array,
    total: Array,
    tokens: Array,
    loss: Array,
    experts: Array | None = None,
    granularity: Array | None = None,
) -> MoeRuns:
    """Checks columns of runs.

    Raises:
      InputError: no run; different lengths; a value that is not positive and finite; a total below the active size.
    """
    columns = {"active": active, "total": total, "tokens": tokens, "loss": loss}
    arrays = {name: np.asarray(one, np.float64).ravel() for name, one in columns.items()}
    length = len(arrays["loss"])
    ones = np.ones(length)
    arrays["experts"] = ones if experts is None else np.asarray(experts, np.float64).ravel()
    arrays["granularity"] = ones if granularity is None else np.asarray(granularity, np.float64).ravel()
    if not length or any(len(one) != length for one in arrays.values()):
        found = ", ".join(f"{name} {len(one)}" for name, one in arrays.items())
        raise InputError(f"Expected columns of one length, with a run at least, got lengths {found}.")
    for name, one in arrays.items():
        bad = ~(np.isfinite(one) & (one > 0))
        if bad.any():
            raise InputError(
                f"Expected positive finite numbers in {name}, got {one[bad][0]} in run {int(np.argmax(bad))} "
                f"({int(bad.sum())} such runs). Remove diverged and unfinished runs first."
            )
    low = arrays["total"] < arrays["active"] * (1 - _DENSE)
    if low.any():
        where = int(np.argmax(low))
        raise InputError(
            f"Expected total parameters of at least the active ones, got {arrays['total'][where]:.4g} total and "
            f"{arrays['active'][where]:.4g} active in run {where}. Are the columns exchanged?"
        )
    return MoeRuns(**arrays)


def one_run(
    active: float, total: float, tokens: float, experts: float | None = None, granularity: float | None = None
) -> MoeRuns:
    """A model without a loss yet, as the laws take it."""
    values = (active, total, tokens, 1.0, 1.0 if experts is None else experts, granularity or 1.0)
    return MoeRuns(*(np.array([value], np.float64) for value in values))


@dataclasses.dataclass(frozen=True)
class MoeLaw:
    """A fitted law of MoE models.

    Attributes:
      form: one of `FORMS`.
      parameters: by the names of the module's formulas; of `granularity`, those of the dense law end in `_dense`.
      draws: parameters of bootstrap samples.
      error: root mean square of log(predicted loss / loss).
      ranges: smallest and largest `active`, `total`, `ratio` (P / N), `tokens`, `experts`, `granularity` of the fit.
      warnings: what a user should know.
    """

    form: MoeForm
    parameters: dict[str, float]
    draws: list[dict[str, float]]
    error: float
    ranges: dict[str, tuple[float, float]]
    warnings: list[str]

    def loss(self, runs: MoeRuns) -> Array:
        """The loss in nats per token of each model."""
        return _loss(self.form, self.parameters, runs)

    def dense_loss(self, params: float, tokens: float) -> float:
        """The loss of a dense model.

        Raises:
          InputError: the law was fitted without dense runs and does not describe dense models.
        """
        return _dense_loss(self.form, self.parameters, params, tokens)

    def samples(self) -> list["MoeLaw"]:
        """The law of each bootstrap sample."""
        return [dataclasses.replace(self, parameters=one, draws=[]) for one in self.draws]

    def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Percentile intervals of the parameters; none without a bootstrap."""
        if not self.draws:
            return {}
        # C0 is a unit, not an estimate.
        names = [name for name in self.parameters if name != "C0"]
        return {name: percentiles([one[name] for one in self.draws], level) for name in names}


def percentiles(values: Sequence[float], level: float) -> tuple[float, float]:
    """The central interval of bootstrap draws. A further draw lies outside it with a probability of 1 - level.

    The ends are draws themselves, counted from the outside, and never closer than they should be; values may be
    infinite. (The usual quantiles of n draws hold less: with 40 draws 86% instead of 90%.)
    """
    ordered = np.sort(np.asarray(values, np.float64))
    outside = max(int((1 - level) / 2 * (len(ordered) + 1) + 1e-9), 1)
    return float(ordered[outside - 1]), float(ordered[-outside])


def _loss(form: MoeForm, p: dict[str, float], runs: MoeRuns) -> Array:
    active, total, tokens = runs.active, runs.total, runs.tokens
    if form in ("bilinear", "saturated"):
        return np.asarray(10 ** _bilinear(p, np.log10(active), _experts(form, p, runs.experts)))
    if form == "granularity":
        dense = p.get("c_dense", np.nan) + p.get("a_dense", np.nan) / active ** p.get("alpha_dense", 1.0)
        dense = dense + p.get("b_dense", np.nan) / tokens ** p.get("beta_dense", 1.0)
        size = (p["g"] / runs.granularity ** p["gamma"] + p["a"]) / total ** p["alpha"]
        return np.where(runs.dense, dense, p["c"] + size + p["b"] / tokens ** p["beta"])
    if form == "sparsity":
        share = np.minimum(active / total, 1.0)
        size = p["a"] / total ** p["alpha"] + p["d"] / (share ** p["delta"] * total ** p["gamma"])
        return np.asarray(p["e"] + size + p["b"] / tokens ** p["beta"] + p["c"] / share ** p["lambda"])
    effective = active * np.exp(_leverage(p, runs))
    return np.asarray(p["e"] + p["a"] / effective ** p["alpha"] + p["b"] / tokens ** p["beta"])


def _dense_loss(form: MoeForm, p: dict[str, float], params: float, tokens: float) -> float:
    if form == "granularity" and "a_dense" not in p:
        raise InputError(
            "The law was fitted without enough dense runs (total equal to active parameters), so there is no dense "
            "law to compare with. Add dense runs to the table, or fit the form leverage."
        )
    return float(_loss(form, p, one_run(params, params, tokens))[0])


def _bilinear(p: dict[str, float], size: Array, experts: Array) -> Array:
    return np.asarray(p["a"] * size + p["b"] * experts + p["c"] * size * experts + p["d"])


def _experts(form: MoeForm, p: dict[str, float], experts: Array) -> Array:
    """log10 E, or log10 Ê."""
    if form == "bilinear":
        return np.log10(experts)
    floor = 1 / (1 / p["E_start"] - 1 / p["E_max"])
    return np.asarray(-np.log10(1 / (experts - 1 + floor) + 1 / p["E_max"]))


def _leverage(p: dict[str, float], runs: MoeRuns) -> Array:
    """log(N_eff / N)."""
    fine = np.log(runs.granularity)
    power = p["k0"] + p["k1"] * np.log(compute(runs.active, runs.tokens) / p["C0"]) + p["k2"] * fine + p["k3"] * fine**2
    return np.asarray(np.log(np.maximum(runs.total / runs.active, 1.0)) * power)


# Fits.


def fit_moe(runs: MoeRuns, form: MoeForm = "leverage", *, samples: int = 100, seed: int = 0) -> MoeLaw:
    """Fits a law of MoE models by least squares of the relative error of the loss.

    Coefficients come by least squares that keeps them non-negative, inside a search over the exponents from several
    starts (variable projection).

    Intervals come from a wild bootstrap (Liu 1988; Davidson & Flachaire 2008, "The wild bootstrap, tamed at last"):
    each draw fits the losses of the law times exp(± r / (1 - h)) with random signs, where r is a run's residual of the
    log loss and h its leverage, as in the HC3 estimate of MacKinnon & White 1985. All runs remain in each draw, so that
    the design stays as it is, and noise may differ between runs.

    Args:
      runs: as `moe_runs` gives them.
      form: see the module.
      samples: of the bootstrap; 0 for none.
      seed: of the starts and of the bootstrap.

    Raises:
      InputError: too few runs, or runs that do not vary in what the form needs.
    """
    warnings = _check(runs, form)
    generator = np.random.default_rng(seed)
    # Units in which exponents and coefficients are nearly independent; the same in each sample of the bootstrap.
    units = float(np.exp(np.log(runs.active).mean())), float(np.exp(np.log(runs.tokens).mean()))
    parameters, place = _fit(runs, form, units, generator, None)
    law = MoeLaw(form, parameters, [], np.nan, _ranges(runs), warnings)
    error = float(np.sqrt(np.nanmean(np.log(law.loss(runs) / runs.loss) ** 2)))
    # A granularity law without dense runs enough has no losses for them.
    fitted = np.where(np.isfinite(law.loss(runs)), law.loss(runs), runs.loss)
    scaled = np.log(runs.loss / fitted) / (1 - leverages(law, runs))
    draws = []
    for _ in range(samples):
        signs = generator.choice([-1.0, 1.0], len(runs))
        drawn = dataclasses.replace(runs, loss=fitted * np.exp(signs * scaled))
        draws.append(_fit(drawn, form, units, generator, place)[0])
    return dataclasses.replace(law, draws=draws, error=error)


def leverages(law: MoeLaw, runs: MoeRuns) -> Array:
    """How much the law's log loss at each run follows this run: the diagonal of the hat matrix of the linearised law.

    The sum is the number of parameters that the runs determine. Values are at most 0.9.
    """
    columns = []
    for name, value in law.parameters.items():
        # A coefficient at its bound of 0 does not move.
        if name == "C0" or value == 0:
            continue
        step = 1e-5 * max(abs(value), 1e-3)
        above, below = (
            np.log(_loss(law.form, {**law.parameters, name: value + sign * step}, runs)) for sign in (1, -1)
        )
        column = np.nan_to_num((above - below) / (2 * step))
        if (size := float(np.linalg.norm(column))) > 0:
            columns.append(column / size)
    basis, singular, _ = np.linalg.svd(np.column_stack(columns), full_matrices=False)
    return np.asarray(np.minimum((basis[:, singular > 1e-6 * singular[0]] ** 2).sum(axis=1), 0.9))


def _ranges(runs: MoeRuns) -> dict[str, tuple[float, float]]:
    columns = {field.name: getattr(runs, field.name) for field in dataclasses.fields(runs) if field.name != "loss"}
    columns["ratio"] = runs.total / runs.active
    return {name: (float(one.min()), float(one.max())) for name, one in columns.items()}


def _varies(values: Array) -> bool:
    return bool(len(values) and values.max() > values.min() * _SAME)


def _check(runs: MoeRuns, form: MoeForm) -> list[str]:
    """Raises an InputError for runs that do not determine the form; returns warnings."""
    if form not in FORMS:
        raise InputError(f"Expected a form of {', '.join(FORMS)}, got {form!r}.")
    moe = runs if form in ("bilinear", "saturated", "sparsity", "leverage") else runs.take(~runs.dense)
    least = {"bilinear": 6, "saturated": 8, "granularity": 9, "sparsity": 12, "leverage": 9}[form]
    if len(moe) < least:
        kind = "runs" if moe is runs else "MoE runs"
        raise InputError(f"Expected at least {least} {kind} for the form {form}, got {len(moe)}.")
    if np.ptp(runs.loss) == 0:
        raise InputError(f"All runs have the same loss, {runs.loss[0]:g}. Is the right column mapped to loss?")
    needs = {
        "bilinear": {"active": moe.active, "experts": moe.experts},
        "granularity": {"total": moe.total, "tokens": moe.tokens, "granularity": moe.granularity},
        "sparsity": {"total": moe.total, "tokens": moe.tokens, "total / active": moe.total / moe.active},
        "leverage": {"active": moe.active, "tokens": moe.tokens, "total / active": moe.total / moe.active},
    }
    needs["saturated"] = needs["bilinear"]
    for name, values in needs[form].items():
        if not _varies(values):
            raise InputError(f"Expected several values of {name} for the form {form}, got {values[0]:.4g} in all runs.")
    if form in ("bilinear", "saturated") and _varies(moe.tokens):
        low, high = moe.tokens.min(), moe.tokens.max()
        raise InputError(
            f"The form {form} describes runs of one number of tokens, got {low:.4g} to {high:.4g}. Fit the runs of one "
            "number of tokens, or another form."
        )
    if form in ("bilinear", "saturated") and (runs.dense & (runs.experts > 1)).any():
        raise InputError("Runs with several experts have total parameters equal to active ones. Correct the columns.")
    warnings = []
    if form == "granularity" and _varies(moe.total / moe.active):
        warnings.append("The ratio of total to active parameters varies, and the form granularity does not read it.")
    if form == "granularity" and not _has_dense(runs):
        warnings.append("Too few dense runs for a dense law: the dense equivalent is not known.")
    if form in ("sparsity", "leverage") and not runs.dense.any():
        warnings.append("No dense runs: the dense equivalent extrapolates to a ratio of total to active of 1.")
    same = len(runs) - len(np.unique(np.stack([getattr(runs, one.name) for one in dataclasses.fields(runs)]), axis=1).T)
    if same:
        warnings.append(f"{same} runs are copies of others; each counts.")
    return warnings


def _has_dense(runs: MoeRuns) -> bool:
    dense = runs.take(runs.dense)
    return len(dense) >= 6 and _varies(dense.active) and _varies(dense.tokens)


_Place: TypeAlias = list[Array]


def _fit(
    runs: MoeRuns, form: MoeForm, units: tuple[float, float], generator: np.random.Generator, place: _Place | None
) -> tuple[dict[str, float], _Place]:
    """Parameters, and the exponents at which the search ended; a search from `place` where it is given."""
    if form in ("bilinear", "saturated"):
        return _fit_bilinear(runs, form, generator, place)
    size, tokens = units
    if form == "granularity":
        moe, dense = runs.take(~runs.dense), runs.take(runs.dense)

        def fine(theta: Array) -> Array:
            p_a = (moe.total / size) ** -theta[0]
            return np.column_stack(
                [np.ones(len(moe)), p_a * moe.granularity ** -theta[2], p_a, (moe.tokens / tokens) ** -theta[1]]
            )

        theta, (c, g, a, b) = _project(fine, moe.loss, [(0.02, 1.5), (0.02, 1.5), (0.02, 3.0)], generator, place, 0)
        alpha, beta, gamma = theta
        p = {"c": c, "g": g * size**alpha, "gamma": gamma, "a": a * size**alpha, "alpha": alpha}
        p |= {"b": b * tokens**beta, "beta": beta}
        places = [theta]
        if _has_dense(dense):

            def plain(theta: Array) -> Array:
                columns = [(dense.active / size) ** -theta[0], (dense.tokens / tokens) ** -theta[1]]
                return np.column_stack([np.ones(len(dense)), *columns])

            theta, (c, a, b) = _project(plain, dense.loss, [(0.02, 1.5), (0.02, 1.5)], generator, place, 1)
            p |= {"c_dense": c, "a_dense": a * size ** theta[0], "alpha_dense": theta[0]}
            p |= {"b_dense": b * tokens ** theta[1], "beta_dense": theta[1]}
            places.append(theta)
        return {name: float(value) for name, value in p.items()}, places
    if form == "sparsity":
        share, total = np.minimum(runs.active / runs.total, 1.0), runs.total / size

        def sparse(theta: Array) -> Array:
            alpha, beta, lam, delta, gamma = theta
            columns = [total**-alpha, (runs.tokens / tokens) ** -beta, share**-lam, share**-delta * total**-gamma]
            return np.column_stack([np.ones(len(runs)), *columns])

        bounds = [(0.02, 1.5), (0.02, 1.5), (-1.0, 1.0), (-1.0, 1.0), (0.02, 1.5)]
        theta, (e, a, b, c, d) = _project(sparse, runs.loss, bounds, generator, place, 0)
        alpha, beta, lam, delta, gamma = theta
        p = {"e": e, "a": a * size**alpha, "alpha": alpha, "b": b * tokens**beta, "beta": beta, "c": c, "lambda": lam}
        p |= {"d": d * size**gamma, "delta": delta, "gamma": gamma}
        return {name: float(value) for name, value in p.items()}, [theta]
    # The form leverage; granularity only where it varies.
    middle = compute(size, tokens)
    fine_grained = _varies(runs.granularity[~runs.dense])

    def effective(theta: Array) -> Array:
        k = dict(zip(("k0", "k1", "k2", "k3"), np.append(theta[2:], [0.0, 0.0])[:4], strict=True)) | {"C0": middle}
        columns = [
            (runs.active / size * np.exp(_leverage(k, runs))) ** -theta[0],
            (runs.tokens / tokens) ** -theta[1],
        ]
        return np.column_stack([np.ones(len(runs)), *columns])

    bounds = [(0.02, 1.5), (0.02, 1.5), (-1.0, 2.0), (-0.5, 0.5)] + [(-1.0, 1.0), (-1.0, 1.0)] * fine_grained
    theta, (e, a, b) = _project(effective, runs.loss, bounds, generator, place, 0)
    p = {"e": e, "a": a * size ** theta[0], "alpha": theta[0], "b": b * tokens ** theta[1], "beta": theta[1]}
    p |= dict(zip(("k0", "k1", "k2", "k3"), np.append(theta[2:], [0.0, 0.0])[:4], strict=True)) | {"C0": middle}
    return {name: float(value) for name, value in p.items()}, [theta]


def _project(
    columns: Callable[[Array], Array],
    loss: Array,
    bounds: Sequence[tuple[float, float]],
    generator: np.random.Generator,
    places: _Place | None,
    index: int,
) -> tuple[Array, Array]:
    """Exponents within bounds, and non-negative coefficients, of the least relative error of a loss.

    Args:
      columns: the design matrix [runs, coefficients] for exponents.
      loss: of each run.
      bounds: lowest and highest value of each exponent.
      generator: of the random starts.
      places: exponents to start from, one array a search; None for several random starts.
      index: of this search in `places`.
    """
    low, high = np.array(bounds).T

    def coefficients(theta: Array) -> Array:
        return np.asarray(nnls(columns(theta) / loss[:, None], np.ones(len(loss)))[0])

    def residuals(theta: Array) -> Array:
        design = columns(theta) / loss[:, None]
        return np.asarray(design @ nnls(design, np.ones(len(loss)))[0] - 1)

    if places is not None:
        starts = [places[index]]
    else:
        # Exponents of public laws are in the lower third of the bounds.
        starts = [low + (high - low) * generator.uniform(0.02, 0.6, len(low)) for _ in range(_STARTS)]
    margin = 1e-6 * (high - low)
    found = [
        least_squares(
            residuals, np.clip(start, low + margin, high - margin), bounds=(low, high), xtol=1e-10, ftol=1e-10
        )
        for start in starts
    ]
    theta = min(found, key=lambda one: float(one.cost)).x
    return theta, coefficients(theta)


def _fit_bilinear(
    runs: MoeRuns, form: MoeForm, generator: np.random.Generator, places: _Place | None
) -> tuple[dict[str, float], _Place]:
    """Least squares of log10 loss; of `saturated` inside a search over (log E_start, log(E_max / E_start))."""
    size, target = np.log10(runs.active), np.log10(runs.loss)

    def solve(ends: dict[str, float]) -> tuple[Array, Array]:
        experts = _experts(form, ends, runs.experts)
        design = np.column_stack([size, experts, size * experts, np.ones(len(runs))])
        coefficients = np.linalg.lstsq(design, target, rcond=None)[0]
        return coefficients, design @ coefficients - target

    def ends(theta: Array) -> dict[str, float]:
        return {"E_start": float(np.exp(theta[0])), "E_max": float(np.exp(theta[0] + theta[1]))}

    theta = np.zeros(0)
    extra: dict[str, float] = {}
    if form == "saturated":
        low, high = np.array([0.0, 0.5]), np.array([3.0, 12.0])
        starts = [generator.uniform(low, high) for _ in range(_STARTS)] if places is None else [places[0]]
        found = [
            least_squares(lambda one: solve(ends(one))[1], np.clip(start, low + 1e-6, high - 1e-6), bounds=(low, high))
            for start in starts
        ]
        theta = min(found, key=lambda one: float(one.cost)).x
        extra = ends(theta)
    coefficients, _ = solve(extra)
    return dict(zip("abcd", coefficients.tolist(), strict=True)) | extra, [theta]
