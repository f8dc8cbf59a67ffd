"""Faults in the launches of CUDA kernels, and in the operators that launch them."""

from __future__ import annotations

from .kinds import Backend, Fault

CUDA_NORMS, CUDA_GRADIENT = "csrc/cuda/algebra/norms.cuh", "csrc/cuda/algebra/gradient.cuh"
LOSS_PLAN, CUDA_BACKWARD = "csrc/cuda/loss_plan.h", "csrc/cuda/algebra/backward.cuh"
CUDA_OPERATOR, CUDA_INPUTS = "csrc/cuda/operator.cpp", "csrc/cuda/inputs.h"
CUDA_BACKWARD_OPERATOR, CUDA_OVERLAP = "csrc/cuda/backward.cpp", "csrc/cuda/overlap.cuh"
CUDA_LAUNCHES, CUDA_PHASES = "csrc/cuda/launches.h", "csrc/cuda/algebra/phases.cuh"
CUDA_ALGEBRA_LAUNCH, CUDA_SUMS = "csrc/cuda/algebra/launch.h", "csrc/cuda/algebra/sums.cuh"
CUDA_SM90_SUMS = "csrc/cuda/sm90/algebra_sums.cuh"

BACKENDS = {
    "cuda_overlap": Backend(
        "tests/csrc/test_cuda_launches.py tests/csrc/test_cuda_loss.py tests/csrc/test_cuda_closed_form.py "
        "-k launches or (every_relation and highest and nlc) or (sm90_tiles and highest and nlc) or many_images",
        [
            Fault("no wait for earlier kernels", CUDA_OVERLAP, "  wait_for_earlier_kernels();\n", ""),
            Fault(
                "members of a kernel are read before it waits",
                CUDA_OVERLAP,
                "  wait_for_earlier_kernels();\n  let_next_kernel_start();\n  Work(arguments...).run();",
                "  Work work(arguments...);\n  wait_for_earlier_kernels();\n  let_next_kernel_start();\n  work.run();",
            ),
            Fault(
                "the next kernel starts before this one waited",
                CUDA_OVERLAP,
                "  wait_for_earlier_kernels();\n  let_next_kernel_start();\n",
                "  let_next_kernel_start();\n  wait_for_earlier_kernels();\n",
            ),
            Fault("alpha is read as an input", CUDA_SUMS, "load_global(alpha +", "load_input(alpha +"),
            Fault("U is read as an input", CUDA_SUMS, "part.template load<false>", "part.template load<true>"),
            Fault("U of sm_90 is read as an input", CUDA_SM90_SUMS, "load_words(word[n]", "load_input_words(word[n]"),
            Fault("the first kernel starts early", CUDA_LAUNCHES, "if (overlap && any) {", "if (overlap) {"),
            Fault("code for sm_80 starts early", CUDA_LAUNCHES, "attributes.ptxVersion >= 90", "true"),
            Fault("kernels start early without being asked", CUDA_LAUNCHES, "overlap = false;", "overlap = true;"),
            Fault("the resident blocks of other bytes", CUDA_LAUNCHES, " | static_cast<uint64_t>(bytes) << 8;", ";"),
            Fault(
                "the resident blocks of another GPU", CUDA_LAUNCHES, "<uint64_t>(device) << 40", "<uint64_t>(1) << 40"
            ),
        ],
    ),
    "cuda_backward": Backend(
        "tests/csrc/test_cuda_backward.py",
        [
            Fault(
                "a unit takes the factor of its first element",
                CUDA_BACKWARD,
                "if (image_of(first + valid - 1) == image)",
                "if (image >= 0)",
            ),
            Fault("grad_loss has no stride", CUDA_BACKWARD, "image * p.grad_loss_stride", "image"),
            Fault("writes one element too many", CUDA_BACKWARD, "if (e < valid) store", "if (e <= valid) store"),
            Fault("rounded to bfloat16", CUDA_BACKWARD, "word[i] = pack<T>", "word[i] = pack<BFloat16>"),
        ],
    ),
    "cuda_operator": Backend(
        "tests/csrc/test_cuda_operator.py tests/csrc/test_cuda_backward.py --core",
        [
            Fault(
                "networks of different layouts",
                CUDA_INPUTS,
                "  make_adjacent(student, pixels), make_adjacent(teacher, pixels);\n",
                "",
            ),
            Fault(
                "copies of 16 bytes wherever features are",
                CUDA_INPUTS,
                "sm80::copy_bytes(x.const_data_ptr(), image_stride, line_stride, static_cast<int>(x.element_size()))",
                "16",
            ),
            Fault("no limit of thread blocks", CUDA_INPUTS, "blocks <= INT32_MAX", "blocks >= 0"),
            Fault(
                "the gradient has the strides of the student",
                CUDA_OPERATOR,
                "= gradient.stride(i)",
                "= student.stride(i)",
            ),
            Fault(
                "medium: the tiles read float32 as bfloat16",
                CUDA_OPERATOR,
                "    tiles_s = q_s.to(at::kBFloat16), tiles_t = q_t.to(at::kBFloat16);\n",
                "",
            ),
            Fault(
                "medium: copies in another layout",
                CUDA_OPERATOR,
                "    make_adjacent(tiles_s, a.pixels_adjacent), make_adjacent(tiles_t, a.pixels_adjacent);\n",
                "",
            ),
            Fault("U of one split", CUDA_OPERATOR, "  if (split && need_grad) at::sum_out(U, U_of_splits, 0);\n", ""),
            Fault("h of one split", CUDA_OPERATOR, "  if (split && need_h) at::sum_out(h, h_of_splits, 0);\n", ""),
            Fault(
                "overlap without being asked",
                CUDA_OPERATOR,
                '"SRPKD_CUDA_OVERLAP", false',
                '"SRPKD_CUDA_OVERLAP", true',
            ),
            Fault(
                "empty features have no loss",
                CUDA_OPERATOR,
                "return {loss.zero_(), gradient.zero_()}",
                "return {loss, gradient}",
            ),
            Fault(
                "no limit of shared memory is set for the tiles",
                "csrc/cuda/sm80/launch.h",
                "allow_all_shared_memory<relation_tiles<C>>()",
                "cudaSuccess",
            ),
            Fault(
                "no limit of shared memory is set for the tiles of Hopper",
                "csrc/cuda/sm90/launch.h",
                "  if (error == cudaSuccess) error = allow_all_shared_memory<relation_tiles<C>>();\n",
                "",
            ),
            Fault(
                "no limit of shared memory is set for the algebra",
                CUDA_ALGEBRA_LAUNCH,
                "SHARED_WITHOUT_ATTRIBUTE = 48 << 10",
                "SHARED_WITHOUT_ATTRIBUTE = 1 << 20",
            ),
            Fault(
                "blocks that wait for each other are not all resident",
                CUDA_LAUNCHES,
                "attribute.val.cooperative = 1",
                "attribute.val.cooperative = 0",
            ),
            Fault("phases follow each other at once", CUDA_PHASES, "    sync_grid();\n", ""),
            Fault("phases share memory with the block before", CUDA_PHASES, "    sync_block();  // the", "    // the"),
            Fault("the first thread blocks of a phase", CUDA_PHASES, "block += grid", "block += x * y"),
            Fault("a phase has one row of blocks", CUDA_PHASES, "block < x * y", "block < x"),
            Fault(
                "norms: a phase stores alpha of the block on the GPU",
                CUDA_NORMS,
                "RowNorms(p, own_block)",
                "RowNorms(p, BlockIndex{block_index(0), 0})",
            ),
            Fault(
                "gradient: a phase computes the block on the GPU",
                CUDA_GRADIENT,
                "index = own_block.x - p.loss_blocks",
                "index = block_index(0) - p.loss_blocks",
            ),
            Fault(
                "errors before the tiles are ignored",
                "csrc/cuda/launch_loss.h",
                "if (error == cudaSuccess) error = launch_tiles",
                "error = launch_tiles",
            ),
            Fault(
                "errors of the tiles are ignored",
                "csrc/cuda/launch_loss.h",
                "return error == cudaSuccess ? algebra",
                "return true ? algebra",
            ),
            Fault(
                "more thread blocks than fit",
                CUDA_ALGEBRA_LAUNCH,
                "std::min(most, resident * launches.together)",
                "most",
            ),
            Fault(
                "the shared memory of the first phase",
                CUDA_ALGEBRA_LAUNCH,
                "std::max({phases.bytes...})",
                "std::min({phases.bytes...})",
            ),
            Fault("no phases together", CUDA_ALGEBRA_LAUNCH, "if (launches.together)", "if (false)"),
            Fault(
                "phases of large calls together",
                LOSS_PLAN,
                ">= multiprocessors;",
                "> 1000 * multiprocessors;",
            ),
            Fault(
                "the error of a launch that was replaced is left",
                CUDA_ALGEBRA_LAUNCH,
                "        cudaGetLastError();",
                "  ",
            ),
            Fault("GPUs that cannot cooperate", CUDA_OPERATOR, " && device.cooperates)", ")"),
            Fault("misaligned gradients", CUDA_BACKWARD_OPERATOR, "% 16 == 0", "% 2 == 0"),
            Fault(
                "images that are not outermost", CUDA_BACKWARD_OPERATOR, "gradient.stride(0) * images == count", "true"
            ),
            Fault("gradients with gaps", CUDA_BACKWARD_OPERATOR, "result.strides() == gradient.strides()", "true"),
            Fault(
                "the factors have no stride",
                CUDA_BACKWARD_OPERATOR,
                "single ? 0 : grad_loss.stride(0)",
                "single ? 0 : 1",
            ),
            Fault("one factor for all images", CUDA_BACKWARD_OPERATOR, "grad_loss.numel() == 1;", "true;"),
        ],
    ),
}
