"""An attack that learns: a small network from boundaries back to tokens.

After SIP of Chen et al., "Unveiling the vulnerability of private fine-tuning in split-based
frameworks for large language models", CCS 2024: a recurrent network that sees the whole boundary
of a text. Here it starts from the ridge map and learns what to add, so that it is not weaker.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence

from fedsplit.privacy.attacks import Observed, Reader, RidgeMap, fit_ridge, most_alike
from fedsplit.privacy.metrics import success

SOFTNESS = (1e-2, 1.0, 1e2, 1e4)
"""Weights of the squared weights that the ridge map is tried with."""
_SHARPNESS = 20.0
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Training:
    """How the network learns.

    Parameters
    ----------
    hidden : int
        Width of its state, each way.
    steps, texts : int
        Steps at most, and texts in each.
    every, patience : int
        Steps between looks at how it reads held-out texts, and looks without gain until it ends.
    lr : float
        Learning rate.
    """

    hidden: int = 192
    steps: int = 250
    texts: int = 8
    every: int = 25
    patience: int = 3
    lr: float = 2e-3


def best_ridge(auxiliary: Observed, embedding: Tensor) -> tuple[RidgeMap, float]:
    """Return the ridge map that reads held-out texts best, fitted on all, and how well it did."""
    learnt, held_out = _divide(auxiliary)
    scores = {
        softness: _score(fit_ridge(learnt, embedding, softness), held_out, embedding)
        for softness in SOFTNESS
    }
    best = max(scores, key=lambda softness: scores[softness])
    return fit_ridge(auxiliary, embedding, best), scores[best]


def ridge_reader(auxiliary: Observed, embedding: Tensor) -> Reader:
    """Return the attack that reads with one linear map, fitted on texts of the server's own."""
    found, _ = best_ridge(auxiliary, embedding)
    return lambda observed: most_alike(found(observed.vectors), embedding)


def inverter_reader(
    auxiliary: Observed, embedding: Tensor, seed: int, training: Training | None = None
) -> Reader:
    """Return the attack that reads with a recurrent network on top of a linear map.

    Parameters
    ----------
    auxiliary : Observed
        Texts of the server's own; a tenth of them says when to stop.
    embedding : Tensor
        The model's input embeddings, ``[vocabulary, width]``, centred.
    seed : int
        Of its weights and of the order of texts.
    training : Training or None
        How it learns.
    """
    settings = training or Training()
    learnt, held_out = _divide(auxiliary)
    start = max(
        (fit_ridge(learnt, embedding, softness) for softness in SOFTNESS),
        key=lambda found: _score(found, held_out, embedding),
    )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = _Inverter(start, settings.hidden)
        _train(network, learnt, held_out, embedding, settings)
    # The ridge map saw fewer texts here than it may; if the network adds nothing, take it whole.
    whole, score = best_ridge(auxiliary, embedding)
    if _accuracy(network, held_out, embedding) <= score:
        return lambda observed: most_alike(whole(observed.vectors), embedding)
    return lambda observed: _read(network, observed, embedding)


class _Inverter(nn.Module):
    """A linear map, and a recurrent network whose part is zero before it has learnt anything."""

    def __init__(self, start: RidgeMap, hidden: int) -> None:
        super().__init__()
        width, out = start.weights.shape[0] - 1, start.weights.shape[1]
        self._start = start
        self._linear = nn.Parameter(start.weights.clone())
        self._recurrent = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self._out = nn.Linear(2 * hidden, out)
        nn.init.zeros_(self._out.weight)
        nn.init.zeros_(self._out.bias)

    def forward(self, texts: list[Tensor]) -> Tensor:
        """Return the embeddings of all positions of `texts`, one text behind the other."""
        rows = [self._start.standard(text) for text in texts]
        states, _ = self._recurrent(pad_sequence(rows, batch_first=True))
        read = torch.cat([state[: len(row)] for state, row in zip(states, rows, strict=True)])
        joined = torch.cat(rows)
        linear = joined @ self._linear[:-1] + self._linear[-1]
        added: Tensor = linear + self._out(read)
        return added


def _train(
    network: _Inverter, learnt: Observed, held_out: Observed, embedding: Tensor, how: Training
) -> None:
    """Train, and leave the network as it was when it read the held-out texts best."""
    # Told apart from are the tokens that the server has seen, and as many again.
    seen = learnt.tokens.unique()
    others = torch.randint(len(embedding), (len(seen),))
    candidates = torch.cat([seen, others]).unique()
    unit = normalize(embedding[candidates]).T
    place = torch.full((len(embedding),), -1).scatter(0, candidates, torch.arange(len(candidates)))
    texts, tokens = _texts(learnt), learnt.tokens.split(list(learnt.lengths))
    optimizer = torch.optim.AdamW(network.parameters(), lr=how.lr, weight_decay=1e-2)
    best, kept = _accuracy(network, held_out, embedding), copy.deepcopy(network.state_dict())
    since = 0
    for step in range(1, how.steps + 1):
        indices = torch.randperm(len(texts))[: how.texts].tolist()
        guessed = network([texts[i] for i in indices])
        wanted = place[torch.cat([tokens[i] for i in indices])]
        loss = cross_entropy(_SHARPNESS * normalize(guessed) @ unit, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % how.every == 0 or step == how.steps:
            reached, since = _accuracy(network, held_out, embedding), since + 1
            if reached > best:
                best, kept, since = reached, copy.deepcopy(network.state_dict()), 0
            if since == how.patience or best == 1:
                break
    network.load_state_dict(kept)


def _divide(auxiliary: Observed) -> tuple[Observed, Observed]:
    """Return the texts to learn from and those to be judged by; the same if there is only one."""
    count = len(auxiliary.lengths)
    first = count - max(1, round(_HELD_OUT * count))
    if first < 1:
        return auxiliary, auxiliary
    return auxiliary.first(first), auxiliary.texts(first, count)


def _texts(observed: Observed) -> list[Tensor]:
    return list(observed.vectors.split(list(observed.lengths)))


@torch.no_grad()
def _read(network: _Inverter, observed: Observed, embedding: Tensor) -> Tensor:
    guessed = torch.cat([network([text]) for text in _texts(observed)])
    return most_alike(guessed, embedding)


def _accuracy(network: _Inverter, observed: Observed, embedding: Tensor) -> float:
    guessed = _read(network, observed, embedding)
    return success(guessed, observed.tokens, observed.lengths).tokens


def _score(found: RidgeMap, observed: Observed, embedding: Tensor) -> float:
    guessed = most_alike(found(observed.vectors), embedding)
    return float((guessed == observed.tokens).double().mean())
