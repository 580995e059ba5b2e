"""Every check is seen to fail: in an environment made for it, and for the reason it is there for."""

from pathlib import Path

import pytest

from tests.support.mutations import Mutation, all_mutations, complaint
from validate import bundle, check, profile, runner

CHECKS = check.load()
MUTATIONS = all_mutations()


def test_every_check_has_an_environment_in_which_it_fails() -> None:
    assert {mutation.check for mutation in MUTATIONS} == set(CHECKS)


def test_each_is_told_apart_by_check_and_name() -> None:
    names = [(mutation.check, mutation.name) for mutation in MUTATIONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "mutation",
    [mutation for mutation in MUTATIONS if mutation.needs == "python"],
    ids=lambda mutation: f"{mutation.check} {mutation.name}",
)
def test_a_check_fails_where_it_must(mutation: Mutation, tmp_path: Path) -> None:
    request = check.Request(
        declared=mutation.declared,
        image=mutation.image,
        options={**profile.DEFAULTS, **mutation.options},
        device=mutation.device,
        scratch=str(tmp_path),
    )
    one = CHECKS[mutation.check]
    result = runner.run_one(one, request, root=bundle.root(), deadline_s=one.deadline_s, prelude=mutation.prelude)
    assert complaint(mutation, result) is None
