from typing import Any

import pytest

from recon.errors import ConfigError
from recon.quantizers.spec import QuantSpec


@pytest.mark.parametrize(
    ("bits", "qmin", "qmax", "by_qmax", "by_range"),
    [(2, -2, 1, 1, 1.5), (4, -8, 7, 7, 7.5), (6, -32, 31, 31, 31.5), (8, -128, 127, 127, 127.5)],
)
def test_codes_and_denominators_follow_the_bits(
    bits: int, qmin: int, qmax: int, by_qmax: float, by_range: float
) -> None:
    spec = QuantSpec(num_bits=bits)
    assert (spec.qmin, spec.qmax, spec.denominator) == (qmin, qmax, by_qmax)
    assert QuantSpec(num_bits=bits, scale_denominator="half_range").denominator == by_range
    assert spec.symmetric


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 9}, r"QuantSpec\.num_bits must lie in \[2, 8\], got 9\. Choose"),
        ({"num_bits": 1}, r"QuantSpec\.num_bits must lie in \[2, 8\], got 1\. Choose"),
        ({"strategy": "block"}, r"strategy is 'block', which is none of tensor, channel, group"),
        ({"scale_denominator": "max"}, r"scale_denominator is 'max', which is none of qmax"),
        ({"strategy": "group"}, r"group_size is None, and strategy group needs at least 1\. Set"),
        ({"strategy": "group", "group_size": 0}, r"group_size is 0, and strategy group needs"),
        ({"group_size": 64}, r"group_size is 64, which strategy channel does not use\. Remove"),
        ({"strategy": "token"}, r"dynamic is false, but strategy token .* Set dynamic: true"),
        ({"dynamic": True}, r"dynamic is true, but strategy channel has a fixed range\. Set"),
    ],
)
def test_broken_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantSpec(**fields)
