"""Changes of basis by what they do to states, and to gradients."""

import pytest
import torch

from lightning_compressm.control import ChangeOfBasis

R, N = 3, 5
STATES = torch.tensor([True, False, True])
OLD = torch.tensor([True, False, False, True, True])


def random_basis(seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(R, N), (R, N), (N, R), (N, R)]
    return ChangeOfBasis(
        *(torch.randn(*batch, *s, generator=generator, dtype=torch.complex128) for s in shapes)
    )


def states(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.complex128)


def to_new(basis, x):
    return basis.left @ x + basis.left_conj @ x.conj()


def to_old(basis, x):
    return basis.right @ x + basis.right_conj @ x.conj()


def flip(x, mask):
    return torch.where(mask.unsqueeze(-1), x.conj(), x)


def test_conjugated_states_are_the_conjugates():
    basis, old, new = random_basis(), states(N), states(R)
    other = basis.conjugated(STATES)
    torch.testing.assert_close(to_new(other, old), flip(to_new(basis, old), STATES))
    torch.testing.assert_close(to_old(other, flip(new, STATES)), to_old(basis, new))
    other = basis.of_conjugated(OLD)
    torch.testing.assert_close(to_new(other, flip(old, OLD)), to_new(basis, old))
    torch.testing.assert_close(to_old(other, new), flip(to_old(basis, new), OLD))


def test_order_and_phases():
    basis, old, new = random_basis(), states(N), states(R)
    order, angles = torch.tensor([2, 0, 1]), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    phases = torch.polar(torch.ones_like(angles), angles)
    other = basis.ordered(order).turned(phases)
    turned = to_new(basis, old)[order] / phases.unsqueeze(-1)
    torch.testing.assert_close(to_new(other, old), turned)
    before = torch.empty_like(new)
    before[order] = new * phases.unsqueeze(-1)
    torch.testing.assert_close(to_old(other, new), to_old(basis, before))


def test_padding_is_found_and_does_nothing():
    basis = random_basis()
    longer = basis.padded(2)
    assert longer.padding().tolist() == [False] * R + [True] * 2
    assert not bool(to_new(longer, states(N))[R:].any())
    assert torch.equal(to_old(longer, states(R + 2)), to_old(basis, states(R + 2)[:R]))


def test_a_bank_and_plain_data():
    one, two = random_basis(0), random_basis(1)
    bank = ChangeOfBasis.stack([one, two])
    assert torch.equal(bank.each(lambda matrix: matrix[1]).right_conj, two.right_conj)
    again = ChangeOfBasis.from_dict({**one.to_dict(), "another": torch.ones(1)})
    assert torch.equal(to_old(again, states(R)), to_old(one, states(R)))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_diagonal_is_that_of_the_projected_state_matrix(batch):
    basis = random_basis(batch=batch)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(*batch, N, generator=generator, dtype=torch.complex128)
    diagonal = torch.diag_embed(values)
    linear = basis.left @ diagonal @ basis.right
    linear = linear + basis.left_conj @ diagonal.conj() @ basis.right_conj.conj()
    wanted = linear.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(basis.diagonal(values), wanted)


def test_gradients_follow_what_autograd_says():
    """B and C of the old states are what the maps make of the new ones."""
    basis, weight = random_basis(), states(N)
    new = states(R).requires_grad_()
    (weight.conj() * to_old(basis, new)).real.sum().backward()
    first, second = basis.input_gradient()
    torch.testing.assert_close(new.grad, first @ weight + second @ weight.conj())
    # Re(C' x') with x' = left x + left_conj conj(x) is Re(C x) with this C, here transposed.
    new = states(R).requires_grad_()
    read = basis.left.mT @ new + basis.left_conj.mH @ new.conj()
    (weight.conj() * read).real.sum().backward()
    first, second = basis.output_gradient()
    torch.testing.assert_close(new.grad, first @ weight + second @ weight.conj())
