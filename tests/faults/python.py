"""Faults in the backends in PyTorch."""

from __future__ import annotations

from .kinds import Backend, Fault

FORMULAS, STRIPS, BLOCKED = "kernels/formulas.py", "kernels/strips.py", "kernels/blocked.py"
CLOSED_FORM, DISTRIBUTED = "kernels/closed_form.py", "kernels/distributed.py"

BACKENDS = {
    "blocked": Backend(
        "tests/kernels/test_backends.py -k blocked",
        [
            Fault(
                "sign(0) is not 0",
                FORMULAS,
                "return difference.sign()",
                "return 2 * (difference >= 0).to(difference) - 1",
            ),
            Fault("huber: wrong offset of the linear part", FORMULAS, "delta * (size - 0.5 * delta)", "delta * size"),
            Fault(
                "a norm of exactly eps counts as nonzero",
                FORMULAS,
                "torch.where(norm <= relation.eps",
                "torch.where(norm < relation.eps",
            ),
            Fault(
                "row: correction M_w q dropped",
                FORMULAS,
                "            result.mT.baddbmm_(weighted_moment, features.mT, alpha=-scale)\n",
                "",
            ),
            Fault(
                "cosine: correction dropped",
                FORMULAS,
                "result.sub_((h * alpha.square()).unsqueeze(-1) * features).mul_(scale)",
                "result.mul_(scale)",
            ),
            Fault(
                "cosine: the diagonal is not a tie",
                STRIPS,
                "difference.diagonal(diagonal, 1, 2).mul_(0)",
                "difference.diagonal(diagonal, 1, 2)",
            ),
            Fault(
                "row: K is not symmetric",
                STRIPS,
                "addcmul_(mirrored_slope, alpha_columns.unsqueeze(1))",
                "addcmul_(mirrored_slope, alpha_rows.unsqueeze(2))",
            ),
            Fault(
                "the mirrored half of the loss counts once",
                BLOCKED,
                "2 * value[..., own:].sum((1, 2))",
                "value[..., own:].sum((1, 2))",
            ),
            Fault(
                "rectify: P is masked by D",
                STRIPS,
                "slope.masked_fill_(relations <= 0",
                "slope.masked_fill_(slope <= 0",
            ),
            Fault(
                "detach_norms: correction kept",
                FORMULAS,
                'return self.normalize != "none" and not self.detach_norms',
                'return self.normalize != "none"',
            ),
            Fault("the last strip is skipped", BLOCKED, "range(0, pixels, rows)", "range(0, pixels - 1, rows)"),
            Fault(
                "h of the columns dropped",
                BLOCKED,
                "            h[:, rest] += terms.mirrored_h[..., own:].sum(1)\n",
                "",
            ),
        ],
    ),
    "closed_form": Backend(
        "tests/kernels/test_backends.py tests/test_loss.py -k closed_form",
        [
            Fault("the loss includes the diagonal", CLOSED_FORM, "loss = loss - total(excess.square().sum(1))", "pass"),
            Fault("h includes the diagonal", CLOSED_FORM, "2 * (h - 2 * excess * diagonal_s)", "2 * h"),
            Fault(
                "U includes the diagonal",
                CLOSED_FORM,
                "U = U - (4 * excess * row_s).unsqueeze(-1) * student",
                "pass",
            ),
            Fault("zero rows of the teacher count", CLOSED_FORM, "total((alpha_t > 0).sum(1))", "total(ones.sum(1))"),
            Fault(
                "the teacher's weights in the mixed moment",
                CLOSED_FORM,
                "total(_moment(teacher, student, row_st))",
                "total(_moment(teacher, student, row_t))",
            ),
            Fault(
                "U lacks the mirrored part",
                CLOSED_FORM,
                "U = 2 * (forward + by_row_s - by_row_st)",
                "U = 4 * forward",
            ),
            Fault(
                "sums in the dtype of the features",
                CLOSED_FORM,
                "SCALE_DTYPE = torch.float64\n",
                "SCALE_DTYPE = torch.float32\n",
            ),
        ],
    ),
    "distributed": Backend(
        "tests/kernels/test_distributed.py",
        [
            Fault(
                "ties between pixels of different ranks",
                DISTRIBUTED,
                "diagonal=start if columns is rows",
                "diagonal=start if rows.student.shape == columns.student.shape",
            ),
            Fault(
                "wrong ties in strips after the first",
                DISTRIBUTED,
                "diagonal=start if",
                "diagonal=0 if",
            ),
            Fault("the gradient is that of one rank's loss", DISTRIBUTED, "ctx.ranks * grad_loss", "grad_loss"),
            Fault(
                "cosine: h lacks the factor 2",
                STRIPS,
                "h = strip.relations.mul_(K)",
                "h = strip.relations.mul_(slope)",
            ),
            Fault(
                "row: K is not symmetric",
                STRIPS,
                "addcmul_(mirrored_slope, alpha_columns.unsqueeze(1))",
                "addcmul_(mirrored_slope, alpha_rows.unsqueeze(2))",
            ),
            Fault("the loss covers one rank's rows", DISTRIBUTED, "sum_over_ranks(loss, group)", "loss"),
            Fault("scales cover one rank's pixels", DISTRIBUTED, "relation, dtype, total, pixels)", "relation, dtype)"),
            Fault(
                "M_w covers one rank's pixels",
                DISTRIBUTED,
                "scales, relation, total, pixels)",
                "scales, relation, formulas.identity, pixels)",
            ),
        ],
    ),
}
