"""Mixtures by regression: losses of many small runs, as a function of their shares, choose the mixture of a large one.

After RegMix (Liu et al. 2024, "RegMix: Data mixture as regression for language model pre-training", arXiv:2407.01492):
small runs on random mixtures; a regression of each held-out loss on the shares; the mixture is the mean of those with
the best prediction among many that are simulated. It relies on the order of mixtures being the same for small and for
large runs, which nothing here can check.
"""

import dataclasses
import importlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_jax.errors import InputError
from train.curate.mixture_plan import water_fill

Model = Literal["auto", "linear", "quadratic", "trees"]
Predict = Callable[[np.ndarray], np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray], Predict]

CONCENTRATIONS = (0.5, 1.0, 2.0, 5.0)
"""Of the Dirichlet distributions, to be multiplied by the number of domains. Small ones give sparse mixtures."""

# Shares of trials are multiples of this, exactly.
_PARTS = 1000
_PENALTIES = np.logspace(-6, 3, 28)
_FOLDS = 10
_TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Trials:
    """Small runs that have ended.

    Attributes:
      domains: names of the shares.
      losses: names of the held-out losses.
      shares_ND: [runs, domains], each row adds up to 1.
      losses_NK: [runs, losses], in nats a token.
      names: of the runs.

    Raises:
      InputError: too few runs, shares that do not add up to 1 or are the same in all runs, a loss that is not finite.
    """

    domains: tuple[str, ...]
    losses: tuple[str, ...]
    shares_ND: np.ndarray
    losses_NK: np.ndarray
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        count, least = len(self.shares_ND), len(self.domains) + 2
        if len(self.domains) < 2 or not self.losses:
            raise InputError(f"A regression needs two domains and a loss, got {self.domains} and {self.losses}.")
        for name, shares in zip(self.names, self.shares_ND, strict=True):
            if not (np.isfinite(shares).all() and (shares >= 0).all() and abs(shares.sum() - 1) <= 1e-6):
                shown = dict(zip(self.domains, shares.tolist(), strict=True))
                raise InputError(f"The shares of the run {name} must be at least 0 and add up to 1, got {shown}.")
        for name, losses in zip(self.names, self.losses_NK, strict=True):
            if bad := [loss for loss, value in zip(self.losses, losses, strict=True) if not math.isfinite(value)]:
                raise InputError(
                    f"The run {name} has no finite loss on {bad[0]}. It has diverged or not ended: run it again, with "
                    "a smaller learning rate, or leave it out."
                )
        if count < least:
            raise InputError(f"{len(self.domains)} domains need at least {least} runs, got {count}. Run more.")
        for name, column in zip(self.domains, self.shares_ND.T, strict=True):
            if np.ptp(column) < 1e-9:
                raise InputError(
                    f"The share of {name} is {column[0]:g} in all runs, so its effect cannot be known. Run other ones."
                )


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a regression predicts runs that it has not seen, by cross-validation.

    Attributes:
      model: its name.
      spearman: rank correlation of predictions and results, for each loss and for the target.
      rmse: root of the mean squared error of the target.
    """

    model: str
    spearman: Mapping[str, float]
    rmse: float


@dataclasses.dataclass(frozen=True)
class Regression:
    """The mixture that a regression picks.

    Attributes:
      shares: of each domain; they add up to 1.
      model: the regression that picked it.
      predicted: its target.
      predicted_prior: the target of the prior.
      best_run: name, shares and target of the best of the runs.
      distance: how far picks without a tenth of the runs are from this pick: the mean of half the summed difference
        of shares. 0 is the same mixture, 1 is a mixture of other domains.
      tried: how well each model predicts; the first one is `model`.
      left_out: models that cannot be tried, each with the reason.
      weights: of the losses in the target.
    """

    shares: Mapping[str, float]
    model: str
    predicted: float
    predicted_prior: float
    best_run: Mapping[str, Any]
    distance: float
    tried: tuple[Quality, ...]
    left_out: tuple[str, ...]
    weights: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """For people."""
        lines = [f"{'model':10s}  {'rank correlation':>16s}  {'error':>8s}  of each loss"]
        for one in self.tried:
            each = "  ".join(f"{name} {value:.2f}" for name, value in one.spearman.items() if name != "target")
            lines.append(f"{one.model:10s}  {one.spearman['target']:16.2f}  {one.rmse:8.4f}  {each}")
        shares = ", ".join(f"{name} {share:.3f}" for name, share in self.shares.items())
        lines += [
            *self.left_out,
            f"mixture by {self.model}: {shares}",
            f"predicted {self.predicted:.4f}, the prior {self.predicted_prior:.4f}; best run {self.best_run['name']} "
            f"{self.best_run['target']:.4f}",
            f"picks without a tenth of the runs are {self.distance:.3f} away",
        ]
        if self.predicted_prior - self.predicted < self.tried[0].rmse:
            lines.append(
                "The predicted gain over the prior is smaller than the error of predictions: the mixture may be no "
                "better. Run more trials, or compare the two in longer runs."
            )
        if not self.tried[0].spearman["target"] >= 0.5:
            lines.append("The rank correlation is low: do not trust this mixture. Run more or longer trials.")
        return "\n".join(lines)


def draw_mixtures(
    prior: Mapping[str, float],
    count: int,
    seed: int = 0,
    concentrations: Sequence[float] = CONCENTRATIONS,
    most: Mapping[str, float] | None = None,
) -> list[dict[str, float]]:
    """Mixtures for small runs: the prior, then draws around it, whose shares are multiples of 1/1000.

    Args:
      prior: shares around which they are, such as those of the tokens of each domain.
      count: how many.
      seed: of the draws.
      concentrations: draws come from Dirichlet distributions with parameters prior x concentration x domains, in turns.
      most: shares that a domain may have at most, such as what its tokens allow in the large run; by default 1.

    Raises:
      InputError: a number out of range, or limits that no draw keeps.
    """
    if count < 1:
        raise InputError(f"Expected at least 1 mixture, got {count}.")
    names, alpha, caps = _checked_prior(prior, concentrations, most)
    rng = np.random.default_rng(seed)
    drawn = [alpha / alpha.sum()]
    for concentration in itertools.islice(itertools.cycle(concentrations), count - 1):
        drawn += list(_draw(rng, alpha, caps, concentration, 1))
    # Rounded, and still within the largest shares.
    limits = [math.floor(_PARTS * cap + 1e-9) for cap in caps]
    if sum(limits) < _PARTS:
        raise InputError(
            f"The largest shares {dict(most or {})} leave no room: in parts of a thousand they are {limits}."
        )
    parts = [water_fill(_PARTS, [Fraction(float(share)) for share in shares], limits) for shares in drawn]
    return [{name: part / _PARTS for name, part in zip(names, row, strict=True)} for row in parts]


def regress(
    trials: Trials,
    prior: Mapping[str, float],
    target: Mapping[str, float] | None = None,
    model: Model = "auto",
    most: Mapping[str, float] | None = None,
    seed: int = 0,
    simulated: int = 100_000,
    best: int = 100,
    concentrations: Sequence[float] = CONCENTRATIONS,
) -> Regression:
    """Picks a mixture.

    Args:
      trials: small runs.
      prior: as of `draw_mixtures`, for the simulated mixtures.
      target: weight of each held-out loss in what is minimised; by default all have the same.
      model: linear in the shares, or quadratic, in shares, their roots and products, with a ridge penalty that
        leave-one-out chooses; gradient-boosted trees (LightGBM if it is installed, else scikit-learn); auto takes the
        one with the smallest error of prediction.
      most: shares that a domain may have at most; by default 1.
      seed: of folds and simulated mixtures.
      simulated: mixtures whose target is predicted.
      best: of them, whose mean is the pick.
      concentrations: as of `draw_mixtures`.

    Raises:
      InputError: other domains or losses, a number out of range, or a model whose library is not installed.
    """
    if not 1 <= best <= simulated:
        raise InputError(f"Expected 1 <= best <= simulated, got {best} and {simulated}.")
    if set(prior) != set(trials.domains):
        raise InputError(
            f"The prior has {sorted(prior)}, the runs have {sorted(trials.domains)}. They must be the same."
        )
    prior = {name: prior[name] for name in trials.domains}
    weights = _target_weights(trials, target)
    weights_K = np.array([weights[name] for name in trials.losses])
    _, alpha, caps = _checked_prior(prior, concentrations, most)
    # Cross-validation of each model.
    folds = _folds(len(trials.names), seed)
    tried: list[Quality] = []
    predictors: dict[str, Fit] = {}
    left_out: list[str] = []
    for name, make in _models(model, left_out).items():
        tried.append(_cross_validated(trials, name, make, folds, weights_K))
        predictors[name] = make
    tried.sort(key=lambda one: one.rmse)
    make = predictors[tried[0].model]
    # The mean of the best of many mixtures, by all runs and without each fold.
    rng = np.random.default_rng([seed, 1])
    each = -(-simulated // len(concentrations))
    drawn_SD = np.concatenate([_draw(rng, alpha, caps, c, each) for c in concentrations])
    predict = _target_predictor(trials, make, weights_K)
    values = predict(drawn_SD)
    pick = _best_mean(drawn_SD, values, best)
    away = []
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(trials.names)), fold)
        without = _target_predictor(trials, make, weights_K, rest)
        away.append(np.abs(_best_mean(drawn_SD, without(drawn_SD), best) - pick).sum() / 2)
    observed = trials.losses_NK @ weights_K
    first = int(observed.argmin())
    return Regression(
        dict(zip(trials.domains, pick.tolist(), strict=True)),
        tried[0].model,
        float(predict(pick[None])[0]),
        float(predict(alpha[None] / alpha.sum())[0]),
        {
            "name": trials.names[first],
            "shares": dict(zip(trials.domains, trials.shares_ND[first].tolist(), strict=True)),
            "target": float(observed[first]),
        },
        float(np.mean(away)),
        tuple(tried),
        tuple(left_out),
        weights,
    )


def read_trials(path: Path) -> Trials:
    """Reads runs from JSON lines, each {"name": ..., "shares": {domain: share}, "losses": {name: nats a token}}.

    A null loss is one that is not finite.

    Raises:
      InputError: no such file, a malformed line, other names than in the first line, or as of `Trials`.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {path}: {error}.") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            shares = {str(k): float(v) for k, v in value["shares"].items()}
            losses = {str(k): math.nan if v is None else float(v) for k, v in value["losses"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f'{path}, line {number}: expected {{"shares": {{}}, "losses": {{}}}} with numbers, got {line[:80]}.'
            ) from None
        records.append((str(value.get("name", number)), shares, losses))
    return make_trials(records, str(path))


def make_trials(records: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]], where: str) -> Trials:
    """Trials from names, shares and losses of runs.

    Args:
      records: of all runs.
      where: they come from, for messages.

    Raises:
      InputError: no records, a record with other names than the first, or as of `Trials`.
    """
    if not records:
        raise InputError(f"{where} has no finished runs.")
    domains, losses = tuple(sorted(records[0][1])), tuple(sorted(records[0][2]))
    for name, shares, found in records:
        if set(shares) != set(domains) or set(found) != set(losses):
            raise InputError(
                f"{where}: the run {name} has shares of {sorted(shares)} and losses on {sorted(found)}, the first one "
                f"{list(domains)} and {list(losses)}."
            )
    return Trials(
        domains,
        losses,
        np.array([[shares[name] for name in domains] for _, shares, _ in records], float),
        np.array([[found[name] for name in losses] for _, _, found in records], float),
        tuple(name for name, _, _ in records),
    )


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """The rank correlation of two series [n], with mean ranks of ties; NaN if one is constant."""
    a, b = (_ranks(x) - (len(x) - 1) / 2 for x in (one, other))
    norm = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray = (ends - (counts + 1) / 2)[which]
    return ranks


def _checked_prior(
    prior: Mapping[str, float], concentrations: Sequence[float], most: Mapping[str, float] | None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, and for each the prior times the number of domains, and the largest share."""
    names = list(prior)
    shares = np.array([prior[name] for name in names], float)
    if len(names) < 2 or not (np.isfinite(shares).all() and (shares > 0).all() and abs(shares.sum() - 1) <= 1e-6):
        raise InputError(f"The prior must have two or more shares above 0 that add up to 1, got {dict(prior)}.")
    if not concentrations or not all(c > 0 and math.isfinite(c) for c in concentrations):
        raise InputError(f"Concentrations must be numbers above 0, got {list(concentrations)}.")
    most = most or {}
    if unknown := sorted(set(most) - set(names)):
        raise InputError(f"most: there is no domain {unknown[0]!r}. There are: {', '.join(names)}.")
    caps = np.array([most.get(name, 1.0) for name in names], float)
    if not ((caps > 0) & (caps <= 1)).all() or caps.sum() < 1:
        raise InputError(f"The largest shares must be above 0, at most 1, and add up to at least 1; got {dict(most)}.")
    if (shares > caps + 1e-9).any():
        name = names[int(np.argmax(shares - caps))]
        raise InputError(f"The prior of {name} is {prior[name]:g}, above its largest share {most[name]:g}.")
    return names, shares / shares.sum() * len(names), caps


def _draw(
    rng: np.random.Generator, alpha: np.ndarray, caps: np.ndarray, concentration: float, count: int
) -> np.ndarray:
    """So many draws that keep the limits, [count, domains]."""
    found: list[np.ndarray] = []
    have = 0
    for _ in range(_TRIES):
        drawn = rng.dirichlet(concentration * alpha, max(count, 64))
        kept = drawn[(drawn <= caps).all(axis=1) & np.isfinite(drawn).all(axis=1)]
        found.append(kept)
        have += len(kept)
        if have >= count:
            return np.concatenate(found)[:count]
    raise InputError(
        f"Hardly any mixture around the prior keeps the largest shares {caps.tolist()}. Choose a prior well below them."
    )


def _target_weights(trials: Trials, target: Mapping[str, float] | None) -> dict[str, float]:
    weights = dict(target) if target else dict.fromkeys(trials.losses, 1.0)
    if unknown := sorted(set(weights) - set(trials.losses)):
        raise InputError(f"target: there is no loss {unknown[0]!r}. There are: {', '.join(trials.losses)}.")
    total = math.fsum(weights.values())
    if not all(w >= 0 and math.isfinite(w) for w in weights.values()) or not total > 0:
        raise InputError(f"Weights of the target must be at least 0, and one above 0; got {weights}.")
    return {name: weights.get(name, 0.0) / total for name in trials.losses}


def _folds(count: int, seed: int) -> list[np.ndarray]:
    order = np.random.default_rng([seed, 2]).permutation(count)
    return [np.sort(part) for part in np.array_split(order, min(_FOLDS, count))]


def _cross_validated(
    trials: Trials, name: str, make: Fit, folds: Sequence[np.ndarray], weights_K: np.ndarray
) -> Quality:
    predicted_NK = np.empty_like(trials.losses_NK)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(trials.names)), fold)
        for k in range(len(trials.losses)):
            predict = make(trials.shares_ND[rest], trials.losses_NK[rest, k])
            predicted_NK[fold, k] = predict(trials.shares_ND[fold])
    found = {loss: spearman(predicted_NK[:, k], trials.losses_NK[:, k]) for k, loss in enumerate(trials.losses)}
    target, expected = predicted_NK @ weights_K, trials.losses_NK @ weights_K
    found["target"] = spearman(target, expected)
    return Quality(name, found, float(np.sqrt(np.mean((target - expected) ** 2))))


def _target_predictor(trials: Trials, make: Fit, weights_K: np.ndarray, rows: np.ndarray | None = None) -> Predict:
    """Predicts the target: a regression of each loss that has a weight."""
    chosen = np.arange(len(trials.names)) if rows is None else rows
    parts = [
        (weight, make(trials.shares_ND[chosen], trials.losses_NK[chosen, k]))
        for k, weight in enumerate(weights_K)
        if weight
    ]
    return lambda shares_ND: np.sum([weight * predict(shares_ND) for weight, predict in parts], axis=0)


def _best_mean(drawn_SD: np.ndarray, values: np.ndarray, best: int) -> np.ndarray:
    mean: np.ndarray = drawn_SD[np.argsort(values, kind="stable")[:best]].mean(axis=0)
    return mean / mean.sum()


def _models(model: Model, left_out: list[str]) -> dict[str, Fit]:
    """The models to try, by name; why one cannot be tried is added to `left_out`."""
    found: dict[str, Fit] = {
        "linear": lambda shares, losses: _ridge(shares, losses, lambda x: x),
        "quadratic": lambda shares, losses: _ridge(shares, losses, _products),
    }
    trees = _trees()
    if trees is not None:
        found["trees"] = trees
    if model == "auto":
        if trees is None:
            left_out.append("trees are left out: neither lightgbm nor scikit-learn is installed.")
        return found
    if model not in found:
        raise InputError("Trees need lightgbm or scikit-learn, which are not installed: pip install scikit-learn.")
    return {model: found[model]}


def _ridge(shares_ND: np.ndarray, losses_N: np.ndarray, features: Callable[[np.ndarray], np.ndarray]) -> Predict:
    """Ridge regression on standardised features; leave-one-out chooses the penalty (Hastie et al., ESL, 7.10)."""
    x = features(shares_ND)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12] = 1.0
    u, s, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    offset = losses_N.mean()
    uy = u.T @ (losses_N - offset)
    best = math.inf, np.zeros_like(s)
    for penalty in _PENALTIES:
        shrink = s**2 / (s**2 + penalty * len(losses_N))
        # The mean is fitted too, which is 1/n of each leverage.
        leverage = (u**2 * shrink).sum(axis=1) + 1 / len(losses_N)
        residual = (losses_N - offset - u @ (shrink * uy)) / np.maximum(1 - leverage, 1e-6)
        error = float(np.mean(residual**2))
        if error < best[0]:
            best = error, shrink
    slopes = vt.T @ (np.divide(best[1] * uy, s, out=np.zeros_like(s), where=s > 1e-12))
    return lambda new: offset + (features(new) - mean) / scale @ slopes


def _products(shares_ND: np.ndarray) -> np.ndarray:
    """The shares, all products of two of them, and their roots: losses fall steeply where a share is near 0."""
    pairs = itertools.combinations_with_replacement(range(shares_ND.shape[1]), 2)
    products = [shares_ND[:, [i]] * shares_ND[:, [j]] for i, j in pairs]
    return np.concatenate([shares_ND, np.sqrt(shares_ND), *products], axis=1)


def _trees() -> Fit | None:
    """Gradient-boosted trees; None where no library has them."""
    library = next((one for one in (_imported("lightgbm"), _imported("sklearn.ensemble")) if one is not None), None)
    if library is None:
        return None

    def fit(shares_ND: np.ndarray, losses_N: np.ndarray) -> Predict:
        # Leaves of few runs: there are tens of runs, not thousands. One thread: more only wait for one another.
        common = {"n_estimators": 100, "learning_rate": 0.1, "random_state": 0}
        leaf = max(2, len(losses_N) // 20)
        if hasattr(library, "LGBMRegressor"):
            made = library.LGBMRegressor(**common, num_leaves=8, min_child_samples=leaf, n_jobs=1, verbose=-1)
        else:
            made = library.GradientBoostingRegressor(**common, max_leaf_nodes=8, min_samples_leaf=leaf)
        made.fit(shares_ND, losses_N)

        def predict(new: np.ndarray) -> np.ndarray:
            values: np.ndarray = np.asarray(made.predict(new), float)
            return values

        return predict

    return fit


def _imported(name: str) -> Any | None:
    """A library that need not be there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
