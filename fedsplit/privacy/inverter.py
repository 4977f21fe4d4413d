"""An attack that learns: a small network from boundaries back to tokens.

After SIP of Chen et al., "Unveiling the vulnerability of private fine-tuning in split-based
frameworks for large language models", CCS 2024: a recurrent network that sees the whole boundary
of a text. Here it starts from the ridge map and learns what to add, so that it is not weaker.
"""

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence

from fedsplit.privacy.attacks import Observed, Reader, RidgeMap, fit_ridge, most_alike

SOFTNESS = (1.0, 1e2, 1e4)
"""Weights of the squared weights that the ridge map is tried with."""
_SHARPNESS = 20.0
_HELD_OUT = 0.1
_OTHERS = 2000


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


@dataclass(frozen=True)
class Learner:
    """A server that learns from texts of its own; a tenth of them tells it what works.

    Parameters
    ----------
    auxiliary : Observed
        Boundaries of its texts.
    embedding : Tensor
        The model's input embeddings, ``[vocabulary, width]``, centred.
    """

    auxiliary: Observed
    embedding: Tensor

    def ridge(self) -> Reader:
        """Return the attack that reads with one linear map."""
        _, softness, _ = self._linear
        (found,) = fit_ridge(self.auxiliary, self.embedding, [softness])
        return lambda observed: most_alike(found(observed.vectors), self.embedding)

    def inverter(self, seed: int, training: Training | None = None) -> Reader:
        """Return the attack that reads with a recurrent network on top of a linear map.

        Where the network adds nothing, it is the linear map alone.

        Parameters
        ----------
        seed : int
            Of its weights and of the order of texts.
        training : Training or None
            How it learns.
        """
        start, _, score = self._linear
        settings = training or Training()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            network = _Inverter(start, settings.hidden).to(self.embedding.device)
            reached = self._train(network, score, settings)
        # Within what chance makes of so few texts the map is preferred: it may learn from all.
        chance = math.sqrt(score * (1 - score) / len(self._parts[1].tokens))
        if reached <= score + chance:
            return self.ridge()
        return lambda observed: _read(network, observed, self.embedding)

    @cached_property
    def _parts(self) -> tuple[Observed, Observed]:
        """The texts to learn from and those to be judged by; the same if there is only one."""
        count = len(self.auxiliary.lengths)
        first = count - max(1, round(_HELD_OUT * count))
        if first < 1:
            return self.auxiliary, self.auxiliary
        return self.auxiliary.first(first), self.auxiliary.texts(first, count)

    @cached_property
    def _vocabulary(self) -> tuple[Tensor, Tensor]:
        """The embeddings that are told apart while it learns, and each token's place among them.

        Those of all tokens that it has seen, and others, since the whole vocabulary takes long.
        """
        seen = torch.unique(self.auxiliary.tokens)
        every = max(1, len(self.embedding) // (_OTHERS + len(seen)))
        others = torch.arange(0, len(self.embedding), every, device=seen.device)
        chosen = torch.unique(torch.cat([seen, others]))
        place = seen.new_full((len(self.embedding),), -1)
        return self.embedding[chosen], place.scatter(0, chosen, torch.arange(len(chosen)).to(seen))

    @cached_property
    def _linear(self) -> tuple[RidgeMap, float, float]:
        """The map that reads held-out texts best, its softness, and how well it did."""
        learnt, held_out = self._parts
        maps = fit_ridge(learnt, self.embedding, SOFTNESS)
        scores = [self._score(found(held_out.vectors)) for found in maps]
        best = scores.index(max(scores))
        return maps[best], SOFTNESS[best], scores[best]

    def _score(self, guessed: Tensor) -> float:
        """Return the share of held-out tokens that `guessed` embeddings are nearest to."""
        known, place = self._vocabulary
        tokens = place[self._parts[1].tokens]
        return float((most_alike(guessed, known) == tokens).double().mean())

    def _train(self, network: "_Inverter", start: float, how: Training) -> float:
        """Train, leave the network as it read the held-out texts best, and return how well."""
        learnt, held_out = self._parts
        known, place = self._vocabulary
        unit = normalize(known).T
        texts, tokens = _texts(learnt), torch.split(place[learnt.tokens], list(learnt.lengths))
        optimizer = torch.optim.AdamW(network.parameters(), lr=how.lr, weight_decay=1e-2)
        best, kept, since = start, copy.deepcopy(network.state_dict()), 0
        for step in range(1, how.steps + 1):
            indices = torch.randperm(len(texts))[: how.texts].tolist()
            guessed = network([texts[i] for i in indices])
            wanted = torch.cat([tokens[i] for i in indices])
            loss = cross_entropy(_SHARPNESS * normalize(guessed) @ unit, wanted)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % how.every == 0 or step == how.steps:
                with torch.no_grad():
                    reached, since = self._score(network(_texts(held_out))), since + 1
                if reached > best:
                    best, kept, since = reached, copy.deepcopy(network.state_dict()), 0
                if since == how.patience or best == 1:
                    break
        network.load_state_dict(kept)
        return best


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


def _texts(observed: Observed) -> list[Tensor]:
    return list(torch.split(observed.vectors, list(observed.lengths)))


@torch.no_grad()
def _read(network: _Inverter, observed: Observed, embedding: Tensor) -> Tensor:
    guessed = torch.cat([network([text]) for text in _texts(observed)])
    return most_alike(guessed, embedding)
