// What sm_90 does asynchronously: barriers in shared memory, TMA, and bulk copies.
#pragma once

#include <cstring>
#include <string>

#include "../../../csrc/cuda/sm90/tensor_map.h"
#include "machine.h"

namespace srpkd::cuda::emulation {

// --- barriers --------------------------------------------------------------------------------------------------------

inline std::string describe(const Barrier& barrier, int index) {
  return "barrier " + std::to_string(index) + " at " + std::to_string(barrier.address) + " (phase " +
         std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
         std::to_string(barrier.arrivals) + " arrivals and " + std::to_string(barrier.bytes) + " bytes missing)";
}

inline void initialize_barrier(Machine& m, Address address, uint32_t arrivals) {
  Block& block = m.block();
  const int index = static_cast<int>(block.barriers.size());
  if (index == MAX_BARRIERS) m.fail("more than " + std::to_string(MAX_BARRIERS) + " barriers");
  if (!arrivals || arrivals >= 1u << 20) m.fail("a barrier for " + std::to_string(arrivals) + " arrivals");
  m.check(block.memory.in_range(address, 8, 8));
  // remains in flight, so that every other access to the barrier is an error
  m.check(block.memory.begin_write(address, 8, block.participants.barrier(index), m.thread(), m.clock()));
  Barrier barrier;
  barrier.address = address, barrier.arrivals = barrier.pending = arrivals;
  barrier.initializer = m.thread(), barrier.initialized = m.now();
  barrier.clock.reset(block.participants.count()), barrier.last_clock.reset(block.participants.count());
  block.barriers.push_back(std::move(barrier));
}

inline Barrier& barrier_at(Machine& m, Address address) {
  for (Barrier& barrier : m.block().barriers)
    if (barrier.address == address) {
      if (barrier.initializer != m.thread() && m.clock().seen(barrier.initializer) < barrier.initialized)
        m.fail("a barrier is used without sync_block() after its initialisation");
      return barrier;
    }
  m.fail("no barrier was initialised at " + std::to_string(address));
}

inline int index_of(Machine& m, const Barrier& barrier) {
  return static_cast<int>(&barrier - m.block().barriers.data());
}

inline void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  std::swap(barrier.clock, barrier.last_clock);
  barrier.clock.reset(barrier.last_clock.participants());
  barrier.pending = barrier.arrivals, ++barrier.phase;
}

inline void arrive(Machine& m, Address address, uint32_t bytes) {
  Barrier& barrier = barrier_at(m, address);
  barrier.bytes += bytes;
  if (barrier.bytes >= 1 << 20)
    m.fail("more than 2^20 - 1 bytes expected at " + describe(barrier, index_of(m, barrier)));
  barrier.clock.join(m.publish());
  --barrier.pending;
  end_phase_if_complete(barrier);
  m.yield();
}

inline void report_bytes(Machine& m, Barrier& barrier, uint32_t bytes) {
  barrier.bytes -= bytes;
  if (barrier.bytes < 0) m.fail("more bytes written than expected at " + describe(barrier, index_of(m, barrier)));
  Time& seen = barrier.clock.seen(m.block().participants.barrier(index_of(m, barrier)));
  seen = m.now();
  end_phase_if_complete(barrier);
}

inline void wait(Machine& m, Address address, uint32_t parity) {
  if (parity > 1) m.fail("parity " + std::to_string(parity));
  Barrier& barrier = barrier_at(m, address);
  const uint32_t phase = barrier.phase;
  if (phase % 2 == parity) {
    m.wait([&barrier, phase] { return barrier.phase != phase; },
           [&barrier, index = index_of(m, barrier)] { return describe(barrier, index); });
    if (barrier.phase != phase + 1)
      m.fail("a thread missed a phase: two phases ended while it waited for " +
             describe(barrier, index_of(m, barrier)));
  }
  m.clock().join(barrier.last_clock);
}

// --- TMA -------------------------------------------------------------------------------------------------------------

// Starts to write shared memory and to report it to a barrier. `write` copies the data.
inline void start_load(Machine& m, Address to, uint32_t bytes, Address at, std::function<void()> write) {
  Block& block = m.block();
  Barrier& barrier = barrier_at(m, at);
  if (!barrier.visible_to_tma) m.fail("a load with a barrier without fence_barrier_initialization() before");
  if (m.current().acquired) m.fail("a load after an acquire without fence_async_proxy_global() between");
  const int writer = block.participants.barrier(index_of(m, barrier));
  m.check(block.memory.begin_write(to, bytes, writer, m.thread(), m.clock()));
  block.operations.push_back({writer, false, 0, 1, [=, &m, &block, &barrier, write = std::move(write)](int) {
                                write();
                                block.memory.finish_write(to, bytes, writer, m.tick());
                                report_bytes(m, barrier, bytes);
                              }});
  m.yield();
}

// Checks what a load with a barrier reads.
inline void start_read(Machine& m, const void* from, int64_t bytes, int alignment, Address barrier, const char* what) {
  const int reader = m.block().participants.barrier(index_of(m, barrier_at(m, barrier)));
  m.access_global(Kind::read, from, bytes, alignment, what, reader, m.now());
}

inline void load_box(Machine& m, Address to, const sm90::TensorMapShape& map, int x, int y, int z, Address barrier) {
  if (const char* reason = unsupported_reason(map)) m.fail(std::string("TMA: ") + reason);
  const uint32_t lines = map.box[1] * map.box[2], bytes = lines * sm90::LINE;
  m.check(m.block().memory.in_range(to, bytes, sm90::ALIGNMENT));
  const int64_t begin = std::max<int64_t>(x, 0), end = std::min<int64_t>(int64_t{x} + map.box[0], map.extents[0]);
  // a line in global memory, or null if it is outside
  const auto line_at = [=](uint32_t line) {
    const int64_t row = int64_t{y} + line % map.box[1], image = int64_t{z} + line / map.box[1];
    const bool inside = begin < end && row >= 0 && row < map.extents[1] && image >= 0 && image < map.extents[2];
    const char* const first = static_cast<const char*>(map.data);
    return inside ? first + 2 * begin + row * map.strides[0] + image * map.strides[1] : nullptr;
  };
  for (uint32_t line = 0; line < lines; ++line)
    if (const char* from = line_at(line)) start_read(m, from, 2 * (end - begin), 2, barrier, "load_box");
  start_load(m, to, bytes, barrier, [=, &memory = m.block().memory] {
    for (uint32_t line = 0; line < lines; ++line) {
      uint16_t values[sm90::LINE / 2] = {};
      if (const char* from = line_at(line)) std::memcpy(values + (begin - x), from, 2 * (end - begin));
      for (int i = 0; i < sm90::LINE; i += 16)
        std::memcpy(memory.at(swizzled(to + line * sm90::LINE + i)), values + i / 2, 16);
    }
  });
}

inline void load_bulk(Machine& m, Address to, const void* from, uint32_t bytes, Address barrier) {
  if (bytes % 16) m.fail("a bulk load of " + std::to_string(bytes) + " bytes, which 16 does not divide");
  start_read(m, from, bytes, 16, barrier, "load_bulk");
  m.check(m.block().memory.in_range(to, bytes, 16));
  start_load(m, to, bytes, barrier, [=, &memory = m.block().memory] { std::memcpy(memory.at(to), from, bytes); });
}

// --- bulk copies to global memory ------------------------------------------------------------------------------------

// Starts to add floats of shared memory to global memory, or to store bytes there. It happens in two steps.
inline void start_bulk(Machine& m, void* to, Address from, uint32_t bytes, bool add) {
  Block& block = m.block();
  if (bytes % 16) m.fail("a bulk copy of " + std::to_string(bytes) + " bytes, which 16 does not divide");
  if (m.current().acquired) m.fail("a bulk copy after an acquire without fence_async_proxy_global() between");
  m.check(block.memory.in_range(from, bytes, 16));
  const int reader = block.participants.bulk(m.warp());
  Bulk& bulk = m.current().bulk;
  for (int i = m.warp() * WARP; i < (m.warp() + 1) * WARP; ++i)
    if (i != m.thread() && block.threads[i].bulk.used) m.fail("bulk copies by two threads of a warp");
  bulk.used = true, bulk.last_start = m.tick();
  m.access_global(add ? Kind::update : Kind::write, to, bytes, 16, "bulk copy",
                  block.participants.bulk_writes(m.warp()), m.now());
  block.memory.begin_read_async();
  m.check(block.memory.read_async(from, bytes, reader, {&m.clock()}, m.now()));
  auto data = std::make_shared<std::vector<char>>(bytes);
  block.operations.push_back({reader, false, bulk.committed, 2, [=, &memory = block.memory](int left) {
                                if (left) return static_cast<void>(std::memcpy(data->data(), memory.at(from), bytes));
                                if (!add) return static_cast<void>(std::memcpy(to, data->data(), bytes));
                                float* sums = static_cast<float*>(to);
                                for (uint32_t i = 0; i < bytes / 4; ++i) {
                                  float value;
                                  std::memcpy(&value, data->data() + 4 * i, 4);
                                  sums[i] += value;
                                }
                              }});
  m.yield();
}

inline void commit_bulk(Machine& m) {
  Bulk& bulk = m.current().bulk;
  bulk.starts.push_back(bulk.last_start), ++bulk.committed;
}

// Waits until the thread's groups but the last `left` have read shared memory, or also written global memory.
inline void wait_for_bulk(Machine& m, uint64_t left, bool writes) {
  const Bulk& bulk = m.current().bulk;
  if (bulk.committed <= left) return;
  const int reader = m.block().participants.bulk(m.warp());
  m.complete(reader, bulk.committed - left, writes ? 0 : 1);
  for (const int participant : {reader, m.block().participants.bulk_writes(m.warp())}) {
    Time& seen = m.clock().seen(participant);
    if (participant == reader || writes) seen = std::max(seen, bulk.starts[bulk.committed - left - 1]);
  }
}

}  // namespace srpkd::cuda::emulation
