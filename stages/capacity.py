"""What a cluster has, what of it is free, what it can grow to, and what that says of processes that need it. Pure.

All processes of a `Need` ask for the same, so how many of them a node has room for is a division; for several needs at once
what is told as lacking is lacking for sure, and what is not told may still be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Bundle = Mapping[str, float]  # resource -> amount, as Ray counts it: CPU, GPU, memory (bytes), a node's own ones


@dataclass(frozen=True)
class Need:
    """Processes, and what each of them asks for."""

    processes: int
    each: Bundle

    def of(self, resource: str) -> float:
        return self.processes * self.each.get(resource, 0)

    def __str__(self) -> str:
        each = " and ".join(f"{amount:g} {resource}" for resource, amount in self.each.items() if amount)
        return f"{self.processes} x {each}"


@dataclass(frozen=True)
class Node:
    total: Bundle
    free: Bundle
    type: str = ""  # as the autoscaler calls it


@dataclass(frozen=True)
class NodeType:
    """Nodes that the autoscaler can start."""

    name: str
    resources: Bundle
    most: float  # of them at a time; may be infinite


@dataclass(frozen=True)
class Growth:
    """What an autoscaler can make of a cluster. `unknown` says why that is not known; then it may be anything."""

    types: tuple[NodeType, ...] = ()
    most_nodes: float = math.inf  # of all types together
    unknown: str = ""

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Growth:
        read: dict[str, Any] = json.loads(text)
        return cls(**read | {"types": tuple(NodeType(**each) for each in read["types"])})


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster and what may come to them; `growth` is None where nothing adds nodes."""

    nodes: tuple[Node, ...]
    growth: Growth | None = None

    @classmethod
    def of(cls, resources: Bundle) -> Capacity:
        """One machine with these resources, all free."""
        return cls((Node(resources, resources),))

    def total(self, resource: str) -> float:
        """How much there is of a resource, free or not."""
        return sum(node.total.get(resource, 0) for node in self.nodes)

    def free(self, resource: str) -> float:
        return sum(node.free.get(resource, 0) for node in self.nodes)

    def most(self, resource: str) -> float:
        """How much there would be if the cluster had grown as far as it can; infinite where that is not known."""
        return self._most(lambda bundle: bundle.get(resource, 0))

    def room(self, each: Bundle) -> float:
        """Processes for which there is room now."""
        return sum(_room(node.free, each) for node in self.nodes)

    def most_room(self, each: Bundle) -> float:
        """Processes for which there would be room if it had grown as far as it can and nothing else ran."""
        return self._most(lambda bundle: _room(bundle, each))

    def _most(self, value: Callable[[Bundle], float]) -> float:
        if self.growth is None:
            return sum(value(node.total) for node in self.nodes)
        if self.growth.unknown:
            return math.inf
        names = {kind.name for kind in self.growth.types}
        stays = sum(value(node.total) for node in self.nodes if node.type not in names)
        left = self.growth.most_nodes
        for kind in sorted(self.growth.types, key=lambda kind: -value(kind.resources)):
            if value(kind.resources) > 0:
                stays += min(kind.most, left) * value(kind.resources)
                left = max(0, left - kind.most)
        return stays

    def has(self, resource: str) -> bool:
        """Whether any node has a resource, or one that may come."""
        kinds = self.growth.types if self.growth is not None else ()
        return any(
            bundle.get(resource, 0) for bundle in [*(n.total for n in self.nodes), *(k.resources for k in kinds)]
        )

    # -- in words

    def lacks(self, needs: Sequence[Need]) -> list[str]:
        """What there will never be enough of, or nothing: `needs 8 GPU; have 4, can grow to 4: will never start`."""
        short = [
            f"needs {wanted:g} {resource}; have {self.total(resource):g}, {self._grows(self.most(resource))}: will never start"
            for resource, wanted in _summed(needs).items()
            if wanted > self.most(resource)
        ]
        return short or [
            f"needs {need}; the nodes have room for {sum(_room(node.total, need.each) for node in self.nodes):g} of these, "
            f"{self._grows(self.most_room(need.each))}: will never start"
            for need in needs
            if need.processes > self.most_room(need.each)
        ]

    def grows_for(self, needs: Sequence[Need]) -> str:
        """What has to come before all of it can run, or nothing: `needs 8 GPU; have 4, can grow to 16`."""
        short = [
            f"needs {wanted:g} {resource}; have {self.total(resource):g}, {self._grows(self.most(resource))}"
            for resource, wanted in _short(needs, self.total)
        ]
        return "; ".join(short)

    def waits_for(self, needs: Sequence[Need]) -> str:
        """What is missing now: `4 GPU: have 0 free of 2, can grow to 4`."""
        short = [
            f"{wanted:g} {resource}: have {self.free(resource):g} free of {self.total(resource):g}, "
            f"{self._grows(self.most(resource))}"
            for resource, wanted in _short(needs, self.free)
        ] or [
            f"{need}: the nodes have room for {self.room(need.each):g} of these, {self._grows(self.most_room(need.each))}"
            for need in needs
            if need.processes > self.room(need.each)
        ]
        return "; ".join(short) or "room: " + "; ".join(map(str, needs))

    def _grows(self, most: float) -> str:
        if self.growth is None:
            return "cannot grow"
        if self.growth.unknown:
            return f"may grow (how far is not known: {self.growth.unknown})"
        return "can grow without a limit" if math.isinf(most) else f"can grow to {most:g}"


def _summed(needs: Iterable[Need]) -> dict[str, float]:
    needs = list(needs)
    names = dict.fromkeys(name for need in needs for name in need.each)
    return {name: total for name in names if (total := sum(need.of(name) for need in needs)) > 0}


def _short(needs: Sequence[Need], has: Callable[[str], float]) -> list[tuple[str, float]]:
    """Of what there is too little. Nodes with GPUs bring CPUs: where GPUs are short, they alone are worth telling."""
    short = {resource: wanted for resource, wanted in _summed(needs).items() if wanted > has(resource)}
    return [("GPU", short["GPU"])] if "GPU" in short else list(short.items())


def _room(bundle: Bundle, each: Bundle) -> float:
    """Processes that have room in a bundle; shares of a GPU add up to rounding."""
    parts = [bundle.get(resource, 0) / amount for resource, amount in each.items() if amount]
    return math.floor(min(parts) + 1e-6) if parts else math.inf
