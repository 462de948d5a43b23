r"""Several networks, or parts of one, that stay apart, and a router that learns whom to ask.

==========================  ==============================================  ===========================================
name                        what it is                                      source
==========================  ==============================================  ===========================================
``MixtureOfExperts``        a layer's experts, of which each token sees     Shazeer et al. 2017, arXiv:1701.06538
                            the k that the router prefers
``upcycle``                 a trained layer copied into one                 Komatsuzaki et al. 2022, arXiv:2212.05055
``balance_loss``            what it costs to ask a few experts only         Fedus, Zoph & Shazeer 2021 (Switch),
                                                                            arXiv:2101.03961
``balanced``                the objective with it
``Routed``                  networks whose probabilities a router mixes     Li et al. 2022 (Branch-Train-Merge),
                                                                            arXiv:2208.03306
``branch_train_merge``      copies trained apart, each on its own data,     Li et al. 2022
                            and the router that is learned for them
==========================  ==============================================  ===========================================
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Dataset, Split
from course_lib.lab.models import freeze
from course_lib.lab.training import Inputs, Objective, Recipe, cross_entropy, fit
from course_lib.merging.alignment import example_of
from course_lib.merging.averaging import average
from course_lib.merging.states import check_not_negative, home, in_evaluation

SEEDS_APART = 100
"""The branches of a tree take seeds this far apart."""

# --- Experts within a layer -------------------------------------------------------------------------------------------


class MixtureOfExperts(nn.Module):
    r"""Experts of one shape: :math:`\sum_{e\in\text{top }k}g_e(x)\,E_e(x)`, the gates g softmax over the chosen k.

    Inputs ``[…, D]``; each row is routed by itself, and only the experts that it chose are run on it. No batch norm in
    the experts: they see other rows each time.

    Raises
    ------
    ValueError : there are no experts, or ``top_k`` is not from 1 to their number.
    """

    def __init__(self, experts: Sequence[nn.Module], router: nn.Linear, top_k: int) -> None:
        super().__init__()
        self.experts, self.router, self.top_k = nn.ModuleList(experts), router, top_k
        require("experts", experts, bool, "at least one network")
        require("top_k", top_k, lambda k: k in range(1, len(experts) + 1), f"from 1 to {len(experts)}, the experts")

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``[…, D]`` to what the experts make of them, ``[…, D']``."""
        rows = x.flatten(0, -2)  # [..., D] -> [rows, D]
        scores, chosen = self.router(rows).topk(self.top_k, dim=1)
        gates = scores.softmax(1)
        out: Tensor | None = None
        for number, expert in enumerate(self.experts):
            which, rank = (chosen == number).nonzero(as_tuple=True)
            said = gates[which, rank, None] * expert(rows[which])
            out = said.new_zeros(len(rows), said.shape[1]) if out is None else out
            out = out.index_add(0, which, said.to(out.dtype))
        assert out is not None
        return out.unflatten(0, x.shape[:-1])


def upcycle(
    model: nn.Module,
    name: str,
    experts: int = 4,
    *,
    generator: torch.Generator,
    top_k: int = 2,
    noise: float = 0.0,
    example_input: Any = None,
) -> nn.Module:
    """Return the network in which the part of that name is a mixture of as many copies of itself.

    The part takes rows ``[…, D]``: ``"hidden"`` of an ``mlp``, ``"blocks.0.mlp"`` of a ``vit``. As the copies are equal
    and the gates sum to 1 the function stays, whatever the router says; its weights are drawn with a standard
    deviation of 0.02. ``noise`` times the standard deviation of each of the copies' tensors sets them apart.

    Raises
    ------
    ValueError : there is no such part, it takes no rows, ``experts`` is below 1, ``top_k`` not from 1 to it, or
        ``noise`` negative.
    """
    at_least(1, experts=experts)
    require("top_k", top_k, lambda k: k in range(1, experts + 1), f"from 1 to {experts}, the experts")
    check_not_negative(noise=noise)
    made = copy.deepcopy(model)
    parts = {key: part for key, part in made.named_modules() if key}
    require("name", name, lambda key: key in parts, f"the name of a part: {', '.join(parts)}")
    size = _row_size(made, name, example_of(made, example_input))
    where = home(parts[name])
    copies = [copy.deepcopy(parts[name]) for _ in range(experts)]
    router = nn.utils.skip_init(nn.Linear, size, experts, bias=False, device=where.device, dtype=where.dtype)
    with torch.no_grad():
        router.weight.copy_(0.02 * torch.randn(experts, size, generator=generator, dtype=torch.float64))
        for p in (p for each in copies for p in each.parameters() if noise):
            spread = p.std() if p.numel() > 1 else p.abs().sum()
            p.add_(noise * spread * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    made.set_submodule(name, MixtureOfExperts(copies, router, top_k).train(parts[name].training))
    return made


@torch.no_grad()
def _row_size(model: nn.Module, name: str, example: Inputs) -> int:
    """The last dimension of what the part takes; only one that gives rows for rows will do."""
    found: list[tuple[torch.Size, torch.Size]] = []
    part = model.get_submodule(name)
    hook = part.register_forward_hook(lambda _part, inputs, output: found.append((inputs[0].shape, output.shape)))
    try:
        with in_evaluation(model):
            model(example)
    finally:
        hook.remove()
    require("name", name, lambda _: bool(found), "a part that is called")
    taken, given = found[0]
    norms = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in part.modules())
    rows = taken[:-1] == given[:-1] and len(taken) in (2, 3) and not norms
    require("name", name, lambda _: rows, "a part without batch norm that takes rows [..., D] and gives as many")
    return taken[-1]


def balance_loss(logits: Tensor) -> Tensor:
    r"""Return :math:`E\sum_ef_eP_e`, 1 where the router asks all E experts alike and E where it asks one alone.

    :math:`f_e` is the share of rows whose first choice is e, :math:`P_e` the mean of its probability; the gradient
    comes through P. ``logits`` are the router's, ``[rows, E]``. Source: Fedus et al. 2021.
    """
    experts = logits.shape[1]
    first = F.one_hot(logits.argmax(1), experts).to(logits.dtype).mean(0)
    return experts * (first * logits.softmax(1).mean(0)).sum()


def balanced(
    model: nn.Module, x: Inputs, y: Tensor, *, strength: float = 0.01, objective: Objective = cross_entropy
) -> Tensor:
    """Return the objective and ``strength`` times the mean ``balance_loss`` of the model's routers.

    Raises
    ------
    ValueError : the model has no ``MixtureOfExperts``, or ``strength`` is negative.
    """
    check_not_negative(strength=strength)
    routers = [part.router for part in model.modules() if isinstance(part, MixtureOfExperts)]
    require("model", type(model).__name__, lambda _: bool(routers), "a network with a MixtureOfExperts")
    said: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda _part, _inputs, output: said.append(output)) for router in routers]
    try:
        loss = objective(model, x, y)
    finally:
        for hook in hooks:
            hook.remove()
    return loss + strength * torch.stack([balance_loss(logits) for logits in said]).mean()


# --- Networks side by side --------------------------------------------------------------------------------------------


class Routed(nn.Module):
    r"""Networks that stay as they are, and a router: :math:`\log\sum_er_e(x)\,p_e(y|x)`, r and p softmax, as logits.

    Trained, only the router learns. It sees inputs as rows, ``[N, …]`` flattened.

    Raises
    ------
    ValueError : there are no experts, or the router has another number of outputs.
    """

    def __init__(self, experts: Sequence[nn.Module], router: nn.Linear) -> None:
        super().__init__()
        require("experts", experts, bool, "at least one network")
        fits = router.out_features == len(experts)
        require("router", router, lambda _: fits, f"a layer with {len(experts)} outputs, one an expert")
        self.experts, self.router = nn.ModuleList(freeze(expert) for expert in experts), router

    def shares(self, x: Tensor) -> Tensor:
        """How much each expert is asked of each example, ``[N, E]``."""
        return self.router(x.flatten(1)).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …]`` to the logarithms of probabilities, ``[N, K]``."""
        said = torch.stack([expert(x).log_softmax(1) for expert in self.experts], 1)  # [N, E, K]
        return (self.router(x.flatten(1)).log_softmax(1)[..., None] + said).logsumexp(1)

    def merged(self, x: Tensor) -> nn.Module:
        """The average of the experts' weights, each as much as it is asked on a batch: one network at the cost of one.

        Source: Li et al. 2022, who weigh by the posterior of the domains.
        """
        with torch.no_grad():
            asked = self.shares(x).double().mean(0)
        return average([*self.experts], (asked / asked.sum()).tolist())


def branch_train_merge(
    base: nn.Module,
    parts: Sequence[Dataset],
    recipe: Recipe,
    *,
    seed: int,
    routing: Recipe | None = None,
    progress: bool | None = None,
) -> Routed:
    """Return copies of a network, each trained on a part of the data alone, and a router learned for them.

    Branch: a copy for each part. Train: each by the recipe, without a word to the others. Merge: a linear router on
    the inputs, all zeros at first (each is asked alike), trained by ``routing`` (by default the recipe) on all parts
    together while the branches rest. The paper weighs its experts by the posterior of the domains; here the router
    learns the weights from the task's own loss. ``progress`` is that of ``fit``.

    Raises
    ------
    ValueError : there are no parts, or they are of other inputs, or normalised by other figures, than the first.
    """
    together = united(parts)
    experts = []
    for place, part in enumerate(parts):
        expert = copy.deepcopy(base).to(dtype=recipe.dtype)
        fit(expert, part, recipe, seed=seed + SEEDS_APART * place, progress=progress)
        experts.append(expert)
    inputs = together.train.inputs
    assert isinstance(inputs, Tensor)
    where = home(experts[0])
    router = nn.utils.skip_init(nn.Linear, inputs[0].numel(), len(experts), device=where.device, dtype=where.dtype)
    nn.init.zeros_(router.weight)
    nn.init.zeros_(router.bias)
    routed = Routed(experts, router)
    fit(routed, together, routing or recipe, seed=seed, progress=progress)
    return routed


def united(parts: Sequence[Dataset]) -> Dataset:
    """Return one data set with the training and validation examples of all parts; the test split is the first's.

    Validation splits that are the same tensors count once.

    Raises
    ------
    ValueError : there are no parts, or one has other inputs or figures of normalisation than the first.
    """
    found = list(parts)
    require("parts", found, bool, "at least one data set")
    first = found[0]
    for place, part in enumerate(found):
        if not isinstance(part.train.inputs, Tensor) or part.input_shape != first.input_shape:
            raise ValueError(
                f"parts[{place}] has inputs of {part.input_shape}: must be one tensor, as {first.input_shape}"
            )
        if (part.train.mean, part.train.std, part.classes) != (first.train.mean, first.train.std, first.classes):
            raise ValueError(f"parts[{place}] has other classes, mean or std than parts[0]: must be normalised alike")
    once = {id(part.val.labels): part.val for part in found}
    return replace(first, train=_joined([part.train for part in found]), val=_joined([*once.values()]))


def _joined(splits: Sequence[Split]) -> Split:
    inputs: Any = [split.inputs for split in splits]
    return replace(splits[0], inputs=torch.cat(inputs), labels=torch.cat([split.labels for split in splits]))
