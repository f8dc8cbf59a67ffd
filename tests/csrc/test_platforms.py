"""The C++ code with other compilers, and on processors whose caches the C library does not know."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

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

FILE* fopen64(const char* path, const char* mode) {
  FILE* (*original)(const char*, const char*) = (FILE * (*)(const char*, const char*)) dlsym(RTLD_NEXT, "fopen64");
  return original(strcmp(path, "/sys/devices/system/cpu/cpu0/cache/index2/size") ? path : CACHE_SIZE, mode);
}
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
