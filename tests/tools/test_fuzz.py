"""A short run of the fuzz: `python -m tools.fuzz` is the long one."""
import pytest

from tools import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_broken_data_sets_are_accepted_or_refused_in_a_sentence(kind):
    outcomes = fuzz.fuzz(kind, examples=40, seed=1)
    assert set(outcomes) <= {"accepted", "refused"} and sum(outcomes.values()) >= 40


def test_unbroken_data_sets_are_accepted(tmp_path):
    class Gentle(fuzz.Breaker):
        def json(self, content):
            return fuzz.json.dumps(content).encode()

        def xml(self, text):
            return text.encode()

    world = fuzz.World(tmp_path)
    for kind in fuzz.KINDS:
        assert fuzz.read_all(world.write(kind, Gentle(lambda items: items[0]))) == "accepted"
