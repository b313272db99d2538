"""bfloat16 products through float32 are those of float64, rounded once; others stay as they are."""

import subprocess
import sys
from pathlib import Path

STUDY = Path(__file__).parents[2] / "study"

# A process of its own, since the products of the whole process are replaced.
CHECK = """
import torch, widened

def near(y, want):
    scale = 2.0 ** -8 if y.dtype == torch.bfloat16 else 1e-5
    assert ((y.double() - want).abs() <= scale * want.abs() + 1e-4).all()

asked = []
given = widened._product
def watched(out, left):
    def told(*args, **more):
        asked.append(args[left].dtype)
        return out(*args, **more)
    return given(told, left)

widened._product = watched
widened.widen()
widened.widen()
for dtype in (torch.bfloat16, torch.float32):
    torch.manual_seed(0)
    a, b = torch.randn(7, 64).to(dtype), torch.randn(64, 5).to(dtype)
    c, many = torch.randn(5).to(dtype), torch.randn(3, 7, 64).to(dtype)
    stacked = b.expand(3, 64, 5)
    for y, want in (
        (a @ b, a.double() @ b.double()),
        (torch.addmm(c, a, b, beta=0.5, alpha=2), 0.5 * c.double() + 2 * a.double() @ b.double()),
        (many @ b, many.double() @ b.double()),
        (torch.bmm(many, stacked), many.double() @ b.double()),
        (torch.baddbmm(c, many, stacked), c.double() + many.double() @ b.double()),
        (torch.nn.functional.linear(a, b.t(), c), a.double() @ b.double() + c.double()),
        (torch.empty(0, 64, dtype=dtype) @ b, torch.empty(0, 5).double()),
    ):
        assert y.dtype == dtype and y.shape == want.shape, (y.dtype, y.shape)
        near(y, want)
    w = b.clone().requires_grad_()
    (a @ w).sum().backward()
    near(w.grad, a.double().t() @ torch.ones(7, 5).double())
assert asked.count(torch.float32) >= 14 and torch.bfloat16 not in asked, asked
print("ok")
"""


def test_products_through_float32() -> None:
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK], cwd=STUDY, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert made.stdout.strip() == "ok", made.stderr
