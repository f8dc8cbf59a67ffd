// The tensor cores of sm_90: wgmma, which a warpgroup starts and later waits for.
//
// Operands are fetched from shared memory when the product happens, at any time until the wait. Until then, registers
// of a sum contain NaN, and an error is reported if the kernel changed them or those of an operand. Products are exact
// and sums are rounded to float after each of the 16 products.
#pragma once

#include <list>
#include <map>
#include <string>
#include <vector>

#include "../../../csrc/cuda/sm90/descriptors.h"
#include "machine.h"

namespace srpkd::cuda::emulation {

using sm90::Major;

// What a thread passes to wgmma.
struct ProductArguments {
  float* sum;
  int registers;      // of the sum: n / 2
  const uint32_t* a;  // four registers, or null: in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
  Major a_major, b_major;
  float (*element)(uint16_t);
};

// The accumulators of a warpgroup while products to them are in flight.
struct Sum {
  float* registers[WARPGROUP];
  int columns;
  std::vector<float> values;  // 64 x columns
  uint64_t last_group = 0;
  bool complete = false;  // waited for
  int held = 0;           // threads that have their values back
};

// The registers of an operand of a product in flight, and their values.
struct Registers {
  uint64_t group;
  const uint32_t* registers[WARPGROUP];
  uint32_t values[WARPGROUP][4];
};

struct TensorCore {            // of a warpgroup
  std::map<float*, Sum> sums;  // by the registers of thread 0
  std::list<Registers> operands;
  uint64_t committed = 0;    // groups
  std::vector<Time> starts;  // of the last product of each committed group
  Time last_start = 0;
  bool fenced = false;
  bool uncommitted = false;
};

inline TensorCore& tensor_core(Machine& m) {
  auto& cores = m.block().tensor_cores;
  if (!cores) cores = std::make_shared<std::vector<TensorCore>>(m.block().threads.size() / WARPGROUP);
  return (*cores)[m.thread() / WARPGROUP];
}

// The register, of the thread in a warpgroup, that has an element of a sum.
struct Place {
  int thread, index;
};
inline Place place(int row, int column) {
  return {row / 16 * WARP + row % 8 * 4 + column % 8 / 2, column / 8 * 4 + row / 8 % 2 * 2 + column % 2};
}

constexpr uint32_t IN_FLIGHT = 0x7fa5a5a5;  // a NaN

// --- operands --------------------------------------------------------------------------------------------------------

struct Descriptor {
  uint32_t address, leading, stride;
};
inline Descriptor decode(Machine& m, uint64_t bits) {
  if (bits >> 62 != 1) m.fail("a descriptor without the 128-byte swizzle, which is all that the emulation supports");
  if (bits >> 49 & 7) m.fail("a descriptor with a base offset, which the emulation does not support");
  const auto field = [&](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; };
  return {field(0), field(16), field(32)};
}

// Calls f(address, row, k) for each 16 bytes of an operand of `rows` rows (columns, for b) by 16 values of k. They are
// elements (row, k ..) of a k-major operand, or (row .., k) of the other.
template <class F>
void for_each_piece(const Descriptor& d, Major major, int rows, F f) {
  if (major == Major::k)
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < 16; k += 8)
        f(swizzled(d.address + row / 8 * d.stride + row % 8 * sm90::LINE + 2 * k), row, k);
  else
    for (int k = 0; k < 16; ++k)
      for (int row = 0; row < rows; row += 8)
        f(swizzled(d.address + row / 64 * d.leading + k / 8 * d.stride + k % 8 * sm90::LINE + row % 64 * 2), row, k);
}

inline void check_operand(Machine& m, uint64_t bits, Major major, int rows) {
  Block& block = m.block();
  const int warpgroup = m.thread() / WARPGROUP;
  std::vector<const Clock*> clocks;
  for (int i = 0; i < WARPGROUP; ++i) clocks.push_back(&block.threads[warpgroup * WARPGROUP + i].clock);
  block.memory.begin_read_async();
  for_each_piece(decode(m, bits), major, rows, [&](uint32_t address, int, int) {
    m.check(block.memory.in_range(address, 16, 16));
    m.check(block.memory.read_async(address, 16, block.participants.products(warpgroup * WARPGROUP_WARPS), clocks,
                                    m.now()));
  });
}

// values[k][row]
inline void fetch(Machine& m, SharedMemory& memory, uint64_t bits, Major major, int rows, float (*element)(uint16_t),
                  float (*values)[128]) {
  for_each_piece(decode(m, bits), major, rows, [&](uint32_t address, int row, int k) {
    uint16_t elements[8];
    std::memcpy(elements, memory.at(address), 16);
    for (int i = 0; i < 8; ++i) (major == Major::k ? values[k + i][row] : values[k][row + i]) = element(elements[i]);
  });
}

// --- products --------------------------------------------------------------------------------------------------------

inline void multiply(const float (*a)[128], const float (*b)[128], Sum& sum, bool accumulate) {
  for (int row = 0; row < 64; ++row) {
    float* const values = sum.values.data() + row * sum.columns;
    if (!accumulate) std::fill(values, values + sum.columns, 0.f);
    for (int k = 0; k < 16; ++k) {
      const float factor = a[k][row];
      for (int column = 0; column < sum.columns; ++column) values[column] += factor * b[k][column];
    }
  }
}

// Takes the values of a sum from the registers, which the kernel may not use from now on.
inline void take(Sum& sum, void** operands) {
  sum.columns = 2 * static_cast<ProductArguments*>(operands[0])->registers;
  sum.values.resize(64 * sum.columns);
  for (int i = 0; i < WARPGROUP; ++i) sum.registers[i] = static_cast<ProductArguments*>(operands[i])->sum;
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < sum.columns; ++column) {
      const Place from = place(row, column);
      float& value = sum.registers[from.thread][from.index];
      sum.values[row * sum.columns + column] = value;
      std::memcpy(&value, &IN_FLIGHT, 4);
    }
}

// Writes the values of a sum back to the registers of the calling thread, if it has been waited for.
inline void hold(Machine& m, const float* registers) {
  if (!m.block().tensor_cores) return;
  TensorCore& core = tensor_core(m);
  const int thread = m.thread() % WARPGROUP;
  const auto found = std::find_if(core.sums.begin(), core.sums.end(), [&](const auto& entry) {
    return entry.second.registers[thread] == registers && entry.second.complete;
  });
  if (found == core.sums.end()) return;
  Sum& sum = found->second;
  for (int row = thread / WARP * 16; row < (thread / WARP + 1) * 16; ++row)
    for (int column = 0; column < sum.columns; ++column) {
      const Place to = place(row, column);
      if (to.thread != thread) continue;
      float& value = sum.registers[thread][to.index];
      if (std::memcmp(&value, &IN_FLIGHT, 4))
        m.fail("the registers of a sum were written before wait_for_products and hold");
      value = sum.values[row * sum.columns + column];
    }
  if (++sum.held == WARPGROUP) core.sums.erase(found);
}

// Starts one product of a warpgroup.
inline void start_product(void** operands) {
  Machine& m = *machine;
  Block& block = m.block();
  TensorCore& core = tensor_core(m);
  const ProductArguments first = *static_cast<ProductArguments*>(operands[0]);
  for (int i = 0; i < WARPGROUP; ++i) {
    const auto& own = *static_cast<ProductArguments*>(operands[i]);
    if (own.a_descriptor != first.a_descriptor || own.b_descriptor != first.b_descriptor ||
        own.accumulate != first.accumulate)
      m.fail("the threads of a warpgroup pass different descriptors to a product");
  }
  if (!core.fenced) m.fail("a group of products without fence_registers() before");
  core.last_start = m.tick(), core.uncommitted = true;
  if (!first.a) check_operand(m, first.a_descriptor, first.a_major, 64);
  check_operand(m, first.b_descriptor, first.b_major, 2 * first.registers);

  const auto [place_of_sum, added] = core.sums.try_emplace(first.sum);
  Sum& sum = place_of_sum->second;
  if (added || (sum.complete && !sum.held && !first.accumulate)) take(sum, operands);
  if (sum.columns != 2 * first.registers) m.fail("products of different shapes to the same sum in flight");
  if (sum.held) m.fail("products to a sum that only some threads have held");
  sum.last_group = core.committed, sum.complete = false;
  const Registers* a = nullptr;
  if (first.a) {
    Registers& own = core.operands.emplace_back();
    own.group = core.committed;
    for (int i = 0; i < WARPGROUP; ++i) {
      own.registers[i] = static_cast<ProductArguments*>(operands[i])->a;
      std::memcpy(own.values[i], own.registers[i], 16);
    }
    a = &own;
  }
  const int stream = block.participants.products(m.thread() / WARPGROUP * WARPGROUP_WARPS);
  block.operations.push_back({stream, true, core.committed, 1, [=, &m, &sum, &memory = block.memory](int) {
                                static float left[16][128], right[16][128];
                                if (a) {
                                  for (int row = 0; row < 64; ++row)
                                    for (int k = 0; k < 16; ++k) {
                                      const Place from = place(row, k);  // two elements to a register
                                      left[k][row] = first.element(static_cast<uint16_t>(
                                          a->values[from.thread][from.index / 2] >> 16 * (k % 2)));
                                    }
                                } else {
                                  fetch(m, memory, first.a_descriptor, first.a_major, 64, first.element, left);
                                }
                                fetch(m, memory, first.b_descriptor, first.b_major, sum.columns, first.element, right);
                                multiply(left, right, sum, first.accumulate);
                              }});
}

inline void fence_registers_of_warpgroup(void**) { tensor_core(*machine).fenced = true; }

inline void commit_products_of_warpgroup(void**) {
  TensorCore& core = tensor_core(*machine);
  core.starts.push_back(core.last_start), ++core.committed;
  core.fenced = core.uncommitted = false;
}

template <int LEFT>
void wait_for_products_of_warpgroup(void**) {
  Machine& m = *machine;
  TensorCore& core = tensor_core(m);
  if (core.uncommitted) m.fail("wait_for_products with products that were never committed");
  if (core.committed <= LEFT) return;
  const int warpgroup = m.thread() / WARPGROUP;
  const Participants& participants = m.block().participants;
  m.complete(participants.products(warpgroup * WARPGROUP_WARPS), core.committed - LEFT, 0);
  for (auto i = core.operands.begin(); i != core.operands.end() && i->group < core.committed - LEFT;
       i = core.operands.erase(i))
    for (int thread = 0; thread < WARPGROUP; ++thread)
      if (std::memcmp(i->values[thread], i->registers[thread], 16))
        m.fail("the registers of an operand were written before wait_for_products");
  for (auto& [registers, sum] : core.sums) sum.complete = sum.last_group < core.committed - LEFT;
  for (int i = warpgroup * WARPGROUP; i < (warpgroup + 1) * WARPGROUP; ++i) {
    Time& seen = m.block().threads[i].clock.seen(participants.products(i / WARP));
    seen = std::max(seen, core.starts[core.committed - LEFT - 1]);
  }
}

}  // namespace srpkd::cuda::emulation
