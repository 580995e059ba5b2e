"""Checks that need a real torch are seen to fail: every environment made for one, in a container of the CPU cell."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.integration.conftest import Built
from tests.support.mutated import in_container
from tests.support.mutations import Mutation, all_mutations, complaint
from validate.verdict import Result

pytestmark = [
    pytest.mark.engine,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

MUTATIONS = [mutation for mutation in all_mutations() if mutation.needs == "torch"]
DEADLINE_S = 1500


@pytest.fixture(scope="module")
def results(cpu_oci: Built) -> Mapping[int, Result]:
    """What the checks said, by the number of the mutation: one container for all, two at a time."""
    return in_container(cpu_oci.name, MUTATIONS, deadline_s=DEADLINE_S)


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=[f"{it.check} {it.name}" for it in MUTATIONS])
def test_a_check_fails_where_it_must(results: Mapping[int, Result], number: int) -> None:
    mutation: Mutation = MUTATIONS[number]
    result = results[number]
    assert result.id == mutation.check
    assert complaint(mutation, result) is None
