"""The C++ code with other compilers, for ARM, and on processors whose caches the C library does not know."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compile_once import compile_once
from torch.utils.cpp_extension import include_paths, library_paths

from srpkd.kernels import build, native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's threads and /sys are those of Linux"),
]

# Visits the numbers below `count`; returns the number of threads at work, or -1 if a thread's exception arrived.
LOOP = """
#include "cpu/parallel_for.h"

#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

extern "C" int visit(int64_t count, int64_t grain, int* visits, int64_t throw_at) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  try {
    srpkd::cpu::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      {
        const std::lock_guard lock(mutex);
        threads.insert(std::this_thread::get_id());
      }
      srpkd::cpu::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
        const std::lock_guard lock(mutex);
        threads.insert(std::this_thread::get_id());
        for (int64_t i = first; i < last; ++i) ++visits[i];
      });
      if (begin <= throw_at && throw_at < end) throw std::runtime_error("expected");
    });
  } catch (const std::runtime_error&) {
    return -1;
  }
  return static_cast<int>(threads.size());
}
"""


@pytest.mark.parametrize("compiler", ["c++", "g++", "clang++"])
@pytest.mark.core(1)
def test_loops_run_on_the_threads_of_torch(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With OpenMP, clang's code would need the runtime library of LLVM beside that of torch, and would not load."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    source = tmp_path_factory.getbasetemp() / "loop.cpp"
    source.write_text(LOOP)
    folders = [
        f"-I{build.CSRC}",
        *(f"-I{path}" for path in include_paths()),
        *(f"-L{path}" for path in library_paths()),
    ]
    flags = [*build.CXX_FLAGS, "-O0", "-w", "-std=c++20", "-fPIC", "-shared"]
    _, library = compile_once(tmp_path_factory, [compiler, *flags, *folders, source, "-ltorch_cpu", "-lc10"], ".so")
    visit = ctypes.CDLL(str(library)).visit
    visit.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]

    def threads(count: int, grain: int, throw_at: int = -1) -> int:
        visits = torch.zeros(count, dtype=torch.int32)
        found = visit(count, grain, visits.data_ptr(), throw_at)
        assert found == -1 or torch.equal(visits, torch.ones_like(visits))
        return found

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for count in (3, 7, 100):
            assert threads(count, 1) == 3
        assert threads(7, 4) == 2
        assert threads(7, 7) == 3  # a loop of one part leaves the threads to the loop in it
        assert threads(1, 1) == 1
        assert threads(0, 1) == 0
        assert threads(7, 1, throw_at=6) == threads(7, 1, throw_at=0) == threads(7, 7, throw_at=3) == -1
        torch.set_num_threads(1)
        assert threads(7, 1) == 1
    finally:
        torch.set_num_threads(before)


# The C library of a processor with a second-level cache of 1280 KB, which it does not know, as on ARM.
C_LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

long sysconf(int name) {
  long (*original)(int) = (long (*)(int))dlsym(RTLD_NEXT, "sysconf");
  return name == _SC_LEVEL2_CACHE_SIZE ? 0 : original(name);
}

static FILE* open_file(const char* function, const char* path, const char* mode) {
  FILE* (*original)(const char*, const char*) = (FILE * (*)(const char*, const char*)) dlsym(RTLD_NEXT, function);
  return original(strcmp(path, "/sys/devices/system/cpu/cpu0/cache/index2/size") ? path : CACHE_SIZE, mode);
}

// the C++ library calls one of them, since GCC 16 the first
FILE* fopen(const char* path, const char* mode) { return open_file("fopen", path, mode); }
FILE* fopen64(const char* path, const char* mode) { return open_file("fopen64", path, mode); }
"""
PRINT_CACHE = 'from srpkd.kernels import native\nprint(native.extension().cpu_capability()["cache_bytes"])'


def test_cache_whose_size_the_c_library_does_not_know(tmp_path_factory: pytest.TempPathFactory) -> None:
    if (reason := native.unavailable_reason(torch.device("cpu"))) is not None:
        pytest.skip(f"native: {reason}")
    folder = tmp_path_factory.getbasetemp()
    source, size = folder / "c_library.c", folder / "size"
    source.write_text(C_LIBRARY)
    size.write_text("1280K\n")
    command = ["cc", "-fPIC", "-shared", f'-DCACHE_SIZE="{size}"', source, "-ldl"]
    _, library = compile_once(tmp_path_factory, command, ".so")
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_CACHE], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 1280 * 1024


# --- ARM: with a cross compiler, and in QEMU's emulation of a process -----------------------------------------------

ARM = "aarch64-linux-gnu-"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
for_arm = pytest.mark.usefixtures("cross_compiler")
FUSED = re.compile(r"\b(fn?m(add|sub)|fml[as])\b")

# Prints all results of the elementwise kernels for tiles of fixed numbers, in hexadecimal digits.
ELEMENTWISE = """
#include "cpu/epilogue.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

using namespace srpkd;

template <typename T>
struct Line {
  alignas(64) T data[LINE];
};

template <typename T>
struct Numbers {  // starts at a multiple of a vector's size
  std::vector<Line<T>> lines;

  explicit Numbers(int64_t count, unsigned seed = 0, bool positive = false) : lines(count / LINE) {
    const T special[] = {0, -T(0), std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::quiet_NaN()};
    for (int64_t i = 0; seed && i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const T value = T(int(seed >> 8) - (positive ? 0 : 1 << 23)) / (1 << 22);
      get()[i] = !positive && i % 23 == 0 && i < 92 ? special[i / 23] : value;
    }
  }
  T* get() { return lines[0].data; }
  void print(const char* name) {
    for (auto& line : lines)
      for (T x : line.data) std::isnan(x) ? std::printf("%s nan\\n", name) : std::printf("%s %a\\n", name, double(x));
  }
};

template <typename T>
void run() {
  constexpr int64_t ROWS = 21, STRIDE = 2 * LINE;
  for (int option = 0; option < 72; ++option) {
    Numbers<T> gram_s(ROWS * STRIDE, 1), gram_t(ROWS * STRIDE, 2), K(ROWS * STRIDE), h(STRIDE), h_columns(STRIDE);
    Numbers<T> row_s(STRIDE, 3, true), row_t(STRIDE, 4, true), column_s(STRIDE, 5, true), column_t(STRIDE, 6, true);
    for (int64_t j = 0; j < STRIDE; ++j) gram_t.get()[5 * STRIDE + j] = gram_s.get()[5 * STRIDE + j];  // exact ties
    row_t.get()[5] = row_s.get()[5];
    const TileOperands<T> tile{ROWS, STRIDE, gram_s.get(), gram_t.get(), K.get(), row_s.get(), row_t.get(),
                               column_s.get(), column_t.get(), h.get(), h_columns.get(), T(0.3), 3};
    const Kind kind{Normalize(option % 3), Distance(option / 3 % 3), option / 9 % 2 > 0, option / 18 % 2 > 0,
                    option / 36 > 0};
    const double total = baseline::kernels<T>.epilogue(tile, kind);
    std::printf("%d %a %a\\n", option, std::isnan(total) ? 0 : total,
                baseline::kernels<T>.sum_of_squares(gram_s.get() + 7 * STRIDE, STRIDE));
    K.print("K"), h.print("h"), h_columns.print("h of columns");
    baseline::kernels<T>.subtract_norm_terms(tile, h_columns.get());
    K.print("K without norms");
  }
}

int main() { run<float>(), run<double>(); }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def cross_compiler(folder: Path) -> None:
    """Skip a test without a cross compiler, or with one that has no C++ library, as those for kernels of Linux."""
    if shutil.which(f"{ARM}g++") is None:
        pytest.skip(f"{ARM}g++ is not installed")
    program = "#include <vector>\nint main() {}\n"
    command = [f"{ARM}g++", "-static", "-x", "c++", "-", "-o", folder / "empty"]
    if subprocess.run(command, input=program, capture_output=True, text=True).returncode:
        pytest.skip(f"{ARM}g++ has no static C++ library")


def instructions(binary: Path) -> str:
    """Return the names and operands of the instructions in a file for ARM, one a line."""
    command = [f"{ARM}objdump", "-d", "--no-show-raw-insn", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@for_arm
@pytest.mark.core(0)
def test_elementwise_kernels_for_arm(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> None:
    """No fused multiply-add, which every processor for ARM has, and the same bits as on x86."""
    driver = folder / "elementwise.cpp"
    driver.write_text(ELEMENTWISE)

    def compiled(prefix: str) -> tuple[Path, Path]:
        compiler = [f"{prefix}g++", *build.CXX_FLAGS, "-O2", "-std=c++17", f"-I{build.CSRC}"]
        source = build.CSRC / "cpu" / "epilogue_baseline.cpp"
        _, kernels = compile_once(tmp_path_factory, [*compiler, "-c", source], ".o")
        linked = ["-static"] if prefix else []  # QEMU has no libraries for ARM
        return kernels, compile_once(tmp_path_factory, [*compiler, *linked, driver, kernels], "")[1]

    kernels, program = compiled(ARM)
    code = instructions(kernels)
    assert "fmul\tv" in code
    assert not FUSED.search(code)
    if QEMU is None or shutil.which("g++") is None or platform.machine() != "x86_64":
        return
    expected = subprocess.run([compiled("")[1]], capture_output=True, text=True, check=True).stdout
    found = subprocess.run([QEMU, program], capture_output=True, text=True, check=True).stdout
    assert len(expected.splitlines()) > 100_000
    assert found == expected


@for_arm
@pytest.mark.core(0)
def test_matrix_products_for_arm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The file with the most code for x86 compiles: its microkernels and queries of the processor are left out."""
    command = [f"{ARM}g++", "-O0", "-w", "-std=c++20", "-c", *(f"-I{path}" for path in include_paths())]
    _, products = compile_once(tmp_path_factory, [*command, build.CSRC / "cpu" / "matrix.cpp"], ".o")
    assert "sgemm_" in subprocess.run([f"{ARM}nm", products], capture_output=True, text=True, check=True).stdout


LIMIT = """
#include "cuda/shared_limit.h"

void kernel() {}
cudaError_t allow() { return srpkd::cuda::allow_all_shared_memory<kernel>(); }
"""


@for_arm
def test_threads_see_the_limit_that_another_has_set(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> None:
    """A thread that launches a kernel without asking needs to see what another has told the runtime, also on ARM."""
    source = folder / "limit.cpp"
    source.write_text(LIMIT)
    runtime = Path(__file__).parent / "cuda_emulation" / "runtime"
    command = [f"{ARM}g++", "-O2", "-std=c++17", "-mno-outline-atomics", "-c", f"-I{build.CSRC}", f"-I{runtime}"]
    _, binary = compile_once(tmp_path_factory, [*command, source], ".o")
    code = instructions(binary)
    assert re.search(r"\b(ldar|ldapr)\b", code)  # acquire
    assert re.search(r"\bstlxr\b", code)  # release
