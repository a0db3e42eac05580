import pytest
import torch
from torch import Tensor, nn

from recon.errors import ConfigError
from recon.quantizers.affine import absmax_scale, fake_quantize, fake_quantize_tokens, weight_range
from recon.quantizers.spec import QuantSpec
from recon.quantizers.transforms import (
    KroneckerTransform,
    Start,
    apply_kronecker,
    cayley,
    factors_of_all,
    kronecker_split,
    smoothing_scale,
    transform_gram,
)
from tests.reference.transform import balanced_split_by_search, kron_by_loop

STARTS: list[Start] = ["reference", "haar", "identity"]


def build(
    width: int = 24, start: Start = "reference", trained_singular_values: bool = True
) -> KroneckerTransform:
    return KroneckerTransform(
        width,
        trained_singular_values=trained_singular_values,
        start=start,
        generator=torch.Generator().manual_seed(5),
    )


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def perturb(transform: KroneckerTransform) -> None:
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("width", "split"),
    [
        (512, (16, 32)),
        (1152, (32, 36)),
        (1536, (32, 48)),
        (1920, (40, 48)),
        (3072, (48, 64)),
        (4608, (64, 72)),
        (5120, (64, 80)),
        (7680, (80, 96)),
        (8960, (80, 112)),
        (12288, (96, 128)),
        (13824, (108, 128)),
        (15360, (120, 128)),
        (1, (1, 1)),
        (13, (1, 13)),
    ],
)
def test_listed_widths_split_as_in_the_paper(width: int, split: tuple[int, int]) -> None:
    assert kronecker_split(width) == split


def test_every_small_width_splits_and_2_modulo_4_falls_back() -> None:
    for width in range(1, 60):
        assert kronecker_split(width) == balanced_split_by_search(width)
    assert kronecker_split(1998) == (1, 1998)
    assert kronecker_split(30, (5, 6)) == (5, 6)


def test_unfit_widths_and_splits_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"split \(5, 7\) has the product 35, but the input is 30"
    ):
        kronecker_split(30, (5, 7))
    with pytest.raises(ConfigError, match=r"split \(-5, -6\) has the product 30"):
        kronecker_split(30, (-5, -6))
    with pytest.raises(ConfigError, match=r"width of at least 1, got 0\. Pass the number"):
        kronecker_split(0)
    with pytest.raises(ConfigError, match=r"factors of 2 and 3 act on 6 channels, .* is 8 wide"):
        apply_kronecker(torch.ones(1, 8), torch.eye(2), torch.eye(3))
    with pytest.raises(ConfigError, match=r"start is 'random', which is none of reference, haar"):
        build(start="random")  # type: ignore[arg-type]


def test_index_convention_equals_a_dense_kron() -> None:
    left, right = draw(3, 3, dtype=torch.float64), draw(4, 4, dtype=torch.float64, seed=1)
    x = draw(2, 5, 12, dtype=torch.float64, seed=2)
    dense = kron_by_loop(left, right)
    torch.testing.assert_close(dense, torch.kron(left, right))
    torch.testing.assert_close(apply_kronecker(x, left, right), x @ dense)
    by_reshape = (left.t() @ x.reshape(2, 5, 3, 4) @ right).reshape(2, 5, 12)
    torch.testing.assert_close(apply_kronecker(x, left, right), by_reshape)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("trained", [True, False])
def test_inverse_transposed_is_what_its_name_says(start: Start, trained: bool) -> None:
    transform = build(start=start, trained_singular_values=trained)
    perturb(transform)
    left, right = transform.factors(torch.float64)
    left_inverse, right_inverse = transform.inverse_transposed_factors(torch.float64)
    for factor, inverse in ((left, left_inverse), (right, right_inverse)):
        identity = torch.eye(len(factor), dtype=torch.float64)
        torch.testing.assert_close(factor.t() @ inverse, identity, rtol=0, atol=1e-6)
        assert torch.allclose(factor.t() @ factor, identity, atol=1e-6) != trained


def test_starting_points() -> None:
    left, right = build(width=64 * 80, start="identity").factors()
    assert torch.equal(left, torch.eye(64))
    assert torch.equal(right, torch.eye(80))
    haar, reference = build(64 * 80, "haar"), build(64 * 80, "reference")
    drawn = haar.left_base
    torch.testing.assert_close(haar.factors()[0], drawn[0] @ drawn[1].t(), atol=1e-5, rtol=0)
    # PyTorch's parametrisation of the same drawn matrix is the start of the reference.
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = drawn[0].clone()
    nn.utils.parametrizations.orthogonal(layer, "weight", "cayley", use_trivialization=False)
    torch.testing.assert_close(cayley(reference.left_skew)[0], layer.weight, atol=1e-5, rtol=0)
    # Energy on the diagonal: observed for FlatQuant's start about 20 %, for Haar 1-3 %.
    assert 0.1 < float(reference.factors()[0].detach().diagonal().square().sum() / 64) < 0.3
    assert float(haar.factors()[0].detach().diagonal().square().sum() / 64) < 0.05


def test_same_seed_same_transform() -> None:
    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert set(first) == {
        f"{side}_{part}" for side in ("left", "right") for part in ("base", "skew", "log_sigma")
    }


@pytest.mark.parametrize("start", STARTS)
def test_layer_is_unchanged_while_nothing_is_rounded(start: Start) -> None:
    transform = build(start=start)
    perturb(transform)
    x, bias = draw(2, 7, 24), draw(10)
    shared = [draw(10, 24, seed=seed) for seed in (1, 2, 3)]  # q, k and v share one transform
    absmax = torch.stack([weight.abs().amax(0) for weight in shared]).amax(0)
    scale = smoothing_scale(x.abs().amax((0, 1)), absmax, 0.5)
    left, right = transform.factors()
    moved = apply_kronecker(x * scale, left, right)
    assert not torch.allclose(moved, x, atol=0.1)
    inverse = transform.inverse_transposed_factors()
    for weight in shared:
        folded = apply_kronecker(weight / scale, *inverse)
        torch.testing.assert_close(
            moved @ folded.t() + bias, x @ weight.t() + bias, rtol=1e-5, atol=2e-5
        )


def test_training_keeps_u_and_v_orthogonal_and_reaches_every_parameter() -> None:
    transform = build()
    log_scale = torch.zeros(24, requires_grad=True)
    clip_logits = torch.full((2,), 4.0, requires_grad=True)
    x = draw(40, 24) * torch.linspace(0.1, 3, 24)
    weight = draw(16, 24, seed=1).requires_grad_(False)
    weights, tokens = QuantSpec(), QuantSpec(strategy="token", dynamic=True)
    learned = [*transform.parameters(), log_scale, clip_logits]
    optimizer = torch.optim.AdamW(learned, lr=2e-2)
    for _ in range(100):
        left, right, left_inverse, right_inverse = transform.all_factors()
        scale = log_scale.exp()
        folded = apply_kronecker(weight / scale, left_inverse, right_inverse)
        folded = fake_quantize(
            folded, absmax_scale(weight_range(folded, weights), weights), weights
        )
        moved = apply_kronecker(x * scale, left, right)
        moved = fake_quantize_tokens(moved, tokens, clip_logits.sigmoid())
        optimizer.zero_grad()
        (moved @ folded.t() - x @ weight.t()).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
        optimizer.step()
    assert weight.grad is None
    for skew in (transform.left_skew, transform.right_skew):
        assert isinstance(skew, nn.Parameter)
        u = cayley(skew.double())
        assert torch.dist(u @ u.mT, torch.eye(u.shape[-1]).double().expand_as(u)) < 1e-10
    assert not torch.allclose(transform.factors()[0], build().factors()[0], atol=1e-2)


def test_gradient_of_the_factors_equals_finite_differences() -> None:
    transform = build(width=6, start="haar").double()  # 2 modulo 4: (1, 6)
    perturb(transform)
    parameters = [p for name, p in transform.named_parameters() if name.startswith("right")]

    def right_factors(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(("right_skew", "right_log_sigma"), values, strict=True))
        result = torch.func.functional_call(transform, named, tie_weights=False)
        return result[1], result[3]

    transform.forward = transform.all_factors  # functional_call needs a forward
    assert torch.autograd.gradcheck(right_factors, tuple(parameters))


def test_factors_compile_and_ignore_autocast() -> None:
    transform = build()
    expected = transform.all_factors()
    compiled = torch.compile(transform.all_factors, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(transform.all_factors(), expected, rtol=0, atol=0)
    assert transform.factors(torch.float64)[0].dtype == torch.float64


def test_smoothing_scale_is_the_reciprocal_of_smoothquants_divisor() -> None:
    activation, weight = torch.tensor([4.0, 0.0, 9.0]), torch.tensor([1.0, 4.0, 0.0])
    scale = smoothing_scale(activation, weight, 0.5)
    expected = torch.tensor([(1 / 4) ** 0.5, (4 / 1e-5) ** 0.5, (1e-5 / 9) ** 0.5])
    torch.testing.assert_close(scale, expected)
    assert smoothing_scale(activation, weight, 1.0)[0].item() == pytest.approx(0.25)
    with pytest.raises(ConfigError, match=r"alpha must lie in \[0, 1\], got 1\.5\. 0\.5 shares"):
        smoothing_scale(activation, weight, 1.5)


def test_gram_of_transformed_inputs() -> None:
    transform = build()
    perturb(transform)
    x = draw(50, 24, dtype=torch.float64)
    scale = draw(24, dtype=torch.float64, seed=4).exp()
    left, right = transform.factors(torch.float64)
    moved = apply_kronecker(x * scale, left, right)
    gram = x.t() @ x
    torch.testing.assert_close(transform_gram(gram, scale, left, right), moved.t() @ moved)
    last = draw(24, dtype=torch.float64, seed=5).exp()
    both = transform_gram(gram, scale, left, right, last)
    torch.testing.assert_close(both, (moved * last).t() @ (moved * last))
    scaled = (x * scale).t() @ (x * scale)
    torch.testing.assert_close(
        transform_gram(gram.float(), scale, None, None), scaled, rtol=1e-5, atol=1e-4
    )
    assert transform_gram(gram.float(), None, left, right).dtype == torch.float64
    with pytest.raises(ConfigError, match=r"only one of the two Kronecker factors\. Pass left and"):
        transform_gram(gram, None, left, None)


def test_factors_of_all_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(3)
    transforms = [
        KroneckerTransform(32, generator=generator),
        KroneckerTransform(48, generator=generator),
        KroneckerTransform(32, generator=generator, trained_singular_values=False),
        KroneckerTransform(32, generator=generator, start="haar"),
    ]
    for together, alone in zip(
        factors_of_all(transforms), (t.all_factors() for t in transforms), strict=True
    ):
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_mixed_precision_leaves_rotations_exact() -> None:
    transform = KroneckerTransform(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    left, right, left_inverse, right_inverse = transform.all_factors()
    inputs, weight = torch.randn(5, 24), torch.randn(7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        rotated = apply_kronecker(inputs, left, right)
        turned_back = apply_kronecker(weight, left_inverse, right_inverse)
    assert rotated.dtype == torch.float32
    torch.testing.assert_close(rotated @ turned_back.T, inputs @ weight.T, rtol=1e-4, atol=1e-4)
