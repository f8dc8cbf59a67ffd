"""Faults in the backends in PyTorch."""

from __future__ import annotations

from .kinds import Backend, Fault

FORMULAS, STRIPS, BLOCKED = "kernels/formulas.py", "kernels/strips.py", "kernels/blocked.py"
BUILD = "kernels/build.py"
SAMPLING = "kernels/sampling.py"
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
                "row: the correction by G has w of one pixel",
                FORMULAS,
                "mul_(w + column_w.mT)",
                "mul_(2 * w)",
            ),
            Fault(
                "row: norms by G without the scale of the features",
                FORMULAS,
                "size.view(-1, 1).square()",
                "size.view(-1, 1)",
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
                "difference.diagonal(0, 1, 2).mul_(0)",
                "difference.diagonal(0, 1, 2)",
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
    "sampling": Backend(
        "tests/kernels/test_sampling.py",
        [
            Fault("h of the sampled columns dropped", BLOCKED, "h[j] += terms.mirrored_h.sum(1)", "pass"),
            Fault("U of the sampled columns dropped", BLOCKED, "U[j] += terms.K.mT @ q_i", "pass"),
            Fault("ties of sampled columns are kept", BLOCKED, "gram.mul_(i.unsqueeze(2) != j.unsqueeze(1))", "pass"),
            Fault("row: D_ji is not counted", BLOCKED, "else distance_value(mirrored, relation)", "else value"),
            Fault("a column twice in a slice of sets", BLOCKED, "end = min(group + disjoint, sets)", "end = sets"),
            Fault("the last row of the first sets is skipped", BLOCKED, "1, pixels % sets)", "1, 0)"),
            Fault(
                "pairs count once",
                BLOCKED,
                "2 * student.shape[1] * columns.shape[2]",
                "student.shape[1] * columns.shape[2]",
            ),
            Fault(
                "the exact loss by a backend without rectify",
                SAMPLING,
                " or relation.rectify or not has_float64",
                " or not has_float64",
            ),
            Fault("columns are not random", SAMPLING, ".argsort(-1)", ".sort(-1).values.argsort(-1)"),
            Fault(
                "columns are drawn without the generator",
                SAMPLING,
                "uniform_(generator=generator)",
                "uniform_(generator=None)",
            ),
        ],
        environment={"SRPKD_BUILD": "0"},
    ),
    "gpus": Backend(
        "tests/kernels/test_measured.py tests/kernels/test_build.py tests/kernels/test_devices.py "
        "-k ranked or code_for or architectures or closed",
        [
            Fault(
                "native has the time of wgmma on every GPU",
                "kernels/measured.py",
                'f"native-{kernel}"',
                '"native-sm90"',
            ),
            Fault("code for an older minor version is enough", BUILD, "version <= capability and (8, 7)", "(8, 7)"),
            Fault("PTX runs on older GPUs", BUILD, 'match[3] == "" and version <= capability', 'match[3] == ""'),
            Fault("Hopper without wgmma", BUILD, 'found.append("9.0a")', 'found.append("9.0")'),
            Fault("old architectures are kept", BUILD, "if version < OLDEST_ARCHITECTURE", "if version < (5, 0)"),
            Fault(
                "large l2 losses by tiles", "kernels/dispatch.py", 'if enough and "closed_form" in runnable', "if False"
            ),
            Fault(
                "auto takes a backend without rectify",
                "kernels/dispatch.py",
                "        and unsupported_flag(name, relation) is None\n",
                "",
                "tests/kernels/test_dispatch.py -k closed_form",
            ),
        ],
        environment={"SRPKD_BUILD": "0"},
    ),
    "closed_form": Backend(
        "tests/kernels/test_backends.py tests/kernels/test_closed_form.py tests/test_loss.py -k closed_form",
        [
            Fault(
                "the loss includes the diagonal",
                CLOSED_FORM,
                "loss = loss - total(diagonal.square().sum(1))",
                "pass",
            ),
            Fault(
                "the gradient includes the diagonal",
                CLOSED_FORM,
                "forward.addcmul_(at(part, diagonal).unsqueeze(-1), scaled_s, value=-1)",
                "pass",
            ),
            Fault("zero rows of the teacher count", CLOSED_FORM, "at(part, alpha_t) > 0", "at(part, alpha_t) >= 0"),
            Fault(
                "energies of the student count twice",
                CLOSED_FORM,
                "(2 * along - energy_s + energy_t)",
                "(2 * along + energy_t)",
            ),
            Fault(
                "the student's scales are missing in the mixed moment",
                CLOSED_FORM,
                "scaled_t.mT @ scaled_s}",
                "scaled_t.mT @ columns_s}",
            ),
            Fault(
                "U lacks the mirrored part",
                CLOSED_FORM,
                '_add_product(forward, columns_s, M["mirrored_s"], factor=2)',
                "pass",
            ),
            Fault(
                "sums in the dtype of the features",
                CLOSED_FORM,
                "SCALE_DTYPE = torch.float64\n",
                "SCALE_DTYPE = torch.float32\n",
            ),
            Fault("moments of the first part only", CLOSED_FORM, "sums[name] += moment", "pass"),
            Fault("the loss of the last part only", CLOSED_FORM, "torch.stack(losses).sum(0)", "losses[-1]"),
            Fault(
                "the lower blocks of a moment are missing",
                FORMULAS,
                "moment[:, right, rows] = moment[:, rows, right].mT",
                "moment[:, right, rows] = 0",
            ),
        ],
    ),
    "distributed": Backend(
        "tests/kernels/test_distributed.py",
        [
            Fault(
                "ties between pixels of different ranks",
                BLOCKED,
                "gram_s, gram_t, row_alphas.at(block), column_alphas, relation, on_diagonal=False",
                "gram_s, gram_t, row_alphas.at(block), column_alphas, relation, on_diagonal=True",
            ),
            Fault("h of the own columns only", DISTRIBUTED, "            h += part.h\n", "            pass\n"),
            Fault("the loss is that of the last hop", DISTRIBUTED, "loss = loss + part.loss", "loss = part.loss"),
            Fault(
                "the gradient is that of one rank's loss",
                DISTRIBUTED,
                "compute, dist.get_world_size(group)",
                "compute, 1",
            ),
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
            Fault("the loss covers one rank's rows", DISTRIBUTED, "ranks.total(loss)", "loss"),
            Fault("scales cover one rank's pixels", DISTRIBUTED, "relation, dtype, ranks)", "relation, dtype)"),
            Fault(
                "M_w covers one rank's pixels",
                DISTRIBUTED,
                "scales, relation, ranks)",
                "scales, relation, pairs=pixels**2)",
            ),
        ],
        environment={"SRPKD_BUILD": "0"},  # blocked, whose faults these are
    ),
}
