"""What `import recon` gives."""

import pytest

import recon
from recon.engine.native import load


def test_load_is_found_when_it_is_asked_for() -> None:
    assert recon.load is load
    assert recon.__version__.count(".") == 2


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'recon' has no attribute 'nonsense'"):
        _ = recon.nonsense
