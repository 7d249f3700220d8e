// Memory, scheduler and matrix products of the machine that runs translated kernels.
#include "machine.hpp"

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

struct Failure {};
struct Range {
  u64 first, end;
};
struct Store {
  u64 address;
  int bytes;
  u8 value[16];
};
struct Member {
  Warp warp;
  std::vector<u32> r;
  std::vector<u64> d;
  std::vector<u16> h;
  std::vector<u8> p;
  std::vector<Store> pending;
};

char message[256];
std::vector<Range> ranges;
u64 random_state;
long idle_turns;  // in which no warp wrote to global memory

}  // namespace

// A store waits in its warp until a barrier hands it to its CTA, and there until a release, or
// until it happens to become visible. Its CTA sees it: "Memory Consistency Model", causality order.
struct Cta {
  std::vector<u8> memory;
  std::vector<Store> pending;
  std::map<u64, u64> l1, constant;  // words of 8 bytes that were loaded
  std::vector<Member> members;
  unsigned live, waiting = 0;
};

void fail(const char* what, int line, u64 a, u64 b) {
  std::snprintf(message, sizeof message, "%s at line %d of the PTX (%llx, %llu)", what, line,
                static_cast<unsigned long long>(a), static_cast<unsigned long long>(b));
  throw Failure();
}

namespace {

u32 draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return u32(random_state >> 20);
}

void check_global(u64 address, int bytes, int line) {
  if (address % bytes) fail("misaligned access to global memory", line, address, bytes);
  for (const Range& range : ranges)
    if (address >= range.first && address + bytes <= range.end) return;
  fail("access outside of the tensors", line, address, bytes);
}

std::vector<Store>& pending_of(Warp& w) { return w.cta->members[w.thread / LANES].pending; }

void forget(Cta& cta, const Store& s) {
  for (u64 word = s.address & ~7ull; word < s.address + s.bytes; word += 8) cta.l1.erase(word);
}

void publish(Cta& cta, std::vector<Store>& stores) {
  for (const Store& s : stores) {
    forget(cta, s);
    std::memcpy(reinterpret_cast<void*>(s.address), s.value, s.bytes);
  }
  stores.clear();
}

void overlay(const std::vector<Store>& stores, u64 address, u8* value, int bytes) {
  for (const Store& s : stores) {
    u64 first = std::max(address, s.address);
    u64 end = std::min(address + bytes, s.address + s.bytes);
    if (first >= end) continue;
    std::memcpy(value + (first - address), s.value + (first - s.address), end - first);
  }
}

void through(std::map<u64, u64>& cache, u64 address, u8* value, int bytes) {
  for (int done = 0; done < bytes;) {
    u64 word = (address + done) & ~7ull;
    int skip = int(address + done - word), count = std::min(8 - skip, bytes - done);
    auto [found, fresh] = cache.try_emplace(word, 0);
    if (fresh) std::memcpy(&found->second, reinterpret_cast<void*>(word), 8);
    std::memcpy(value + done, reinterpret_cast<u8*>(&found->second) + skip, count);
    done += count;
  }
}

}  // namespace

bool chance(u32 one_in) { return draw() % one_in == 0; }

void load(Warp& w, u64 address, void* value, int bytes, int line, Cache cache) {
  check_global(address, bytes, line);
  u8* out = static_cast<u8*>(value);
  if (cache == Cache::coherent)
    std::memcpy(out, reinterpret_cast<void*>(address), bytes);
  else
    through(cache == Cache::l1 ? w.cta->l1 : w.cta->constant, address, out, bytes);
  if (cache == Cache::never_emptied) return;
  overlay(w.cta->pending, address, out, bytes);
  overlay(pending_of(w), address, out, bytes);
}

void store(Warp& w, u64 address, const void* value, int bytes, int line) {
  check_global(address, bytes, line);
  Store s{address, bytes, {}};
  std::memcpy(s.value, value, bytes);
  forget(*w.cta, s);
  pending_of(w).push_back(s);
  idle_turns = 0;
}

u8* shared(Warp& w, u32 address, int bytes, int line) {
  std::vector<u8>& memory = w.cta->memory;
  if (u64(address) + bytes > memory.size())
    fail("access outside of shared memory", line, address, bytes);
  if (address % bytes) fail("misaligned access to shared memory", line, address, bytes);
  return memory.data() + address;
}

void acquire(Warp& w) { w.cta->l1.clear(); }

// A release is cumulative: it also publishes what barriers have ordered before it in the CTA.
u32 atomic_add(Warp& w, u64 address, u32 value, int line, bool acquires, bool releases) {
  check_global(address, 4, line);
  if (releases) {
    publish(*w.cta, w.cta->pending);
    publish(*w.cta, pending_of(w));
  }
  if (acquires) acquire(w);
  u32 before, after;
  std::memcpy(&before, reinterpret_cast<void*>(address), 4);
  after = before + value;
  if (value) idle_turns = 0;
  std::memcpy(reinterpret_cast<void*>(address), &after, 4);
  return before;
}

bool branches(const Warp&, const u8* predicate, bool wanted, int line) {
  int taken = 0;
  EACH taken += bool(predicate[l]) == wanted;
  if (taken % LANES) fail("branch on which the lanes of a warp differ", line, taken);
  return taken > 0;
}

u64 uniform(const u64* lanes, int line) {
  EACH if (lanes[l] != lanes[0]) fail("matrix descriptor that differs in a warp", line, lanes[l]);
  return lanes[0];
}

float f16(u16 x) {
  int exponent = x >> 10 & 31, fraction = x & 1023;
  float size = exponent == 31 ? (fraction ? NAN : INFINITY)
               : exponent     ? std::ldexp(float(fraction | 1024), exponent - 25)
                              : std::ldexp(float(fraction), -24);
  return x >> 15 ? -size : size;
}

u16 to_f16(float f) {
  if (f != f) return 0x7fff;
  u16 sign = u16(bits(f) >> 16 & 0x8000);
  float size = std::fabs(f);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | u16(std::nearbyint(size * 0x1p24f));
  u32 x = bits(size);
  x += 0xfff + (x >> 13 & 1);
  return sign | u16((x - (112u << 23)) >> 13);
}

u16 to_bf16(float f) {
  if (f != f) return 0x7fff;
  u32 x = bits(f);
  return u16((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

u32 to_tf32(u32 x) {
  bool finite = (x & 0x7f800000) != 0x7f800000;
  return finite ? (x + 0x1000) & 0xffffe000u : x;
}

// "prmt": each nibble of the selector picks a byte of the pair, or, with its top bit, its sign.
u32 byte_permute(u32 low, u32 high, u32 selector) {
  u64 pair = u64(high) << 32 | low;
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    u32 nibble = selector >> 4 * i & 15, byte = pair >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}

u32 logic3(u32 x, u32 y, u32 z, u32 table) {
  u32 out = 0;
  for (int i = 0; i < 32; i++)
    out |= (table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i;
  return out;
}

// "bfe" and "bfi": position and count are their operands' lowest bytes; past the end there are
// sign bits, or nothing.
u64 extract_bits(u64 x, u32 position, u32 count, int width, bool is_signed) {
  position &= 255, count &= 255;
  if (count == 0) return 0;
  u64 top = x >> (width - 1) & 1 ? ~0ull : 0;
  if (width == 32) x = is_signed ? u64(s64(s32(x))) : u32(x);
  x = position < 64 ? (is_signed ? u64(s64(x) >> position) : x >> position) : is_signed ? top : 0;
  if (count >= 64) return x;
  x &= (1ull << count) - 1;
  return is_signed && x >> (count - 1) & 1 ? x | ~0ull << count : x;
}

u64 insert_bits(u64 field, u64 into, u32 position, u32 count) {
  position &= 255, count &= 255;
  if (position >= 64) return into;
  u64 mask = (count >= 64 ? ~0ull : (1ull << count) - 1) << position;
  return (into & ~mask) | (field << position & mask);
}

// "ldmatrix": lanes 8i .. 8i + 7 give the rows of matrix i, 8 elements of 16 bits each; lane l gets
// two neighbours of row l / 4, or, transposed, of column l / 4.
void ldmatrix(Warp& w, const u32* addresses, const int* to, int count, bool transposed, int line) {
  for (int i = 0; i < count; i++) {
    u16 tile[8][8];
    for (int row = 0; row < 8; row++)
      std::memcpy(tile[row], shared(w, addresses[8 * i + row], 16, line), 16);
    EACH {
      int outer = l / 4, inner = 2 * (l % 4);
      u16 low = transposed ? tile[inner][outer] : tile[outer][inner];
      u16 high = transposed ? tile[inner + 1][outer] : tile[outer][inner + 1];
      w.r[to[i]][l] = u32(high) << 16 | low;
    }
  }
}

void stmatrix(Warp& w, const u32* addresses, const int* from, int count, bool transposed,
              int line) {
  for (int i = 0; i < count; i++) {
    u16 tile[8][8];
    EACH {
      int outer = l / 4, inner = 2 * (l % 4);
      u32 pair = w.r[from[i]][l];
      (transposed ? tile[inner][outer] : tile[outer][inner]) = u16(pair);
      (transposed ? tile[inner + 1][outer] : tile[outer][inner + 1]) = u16(pair >> 16);
    }
    for (int row = 0; row < 8; row++)
      std::memcpy(shared(w, addresses[8 * i + row], 16, line), tile[row], 16);
  }
}

namespace {

constexpr int MAX_DEPTH = 16, MAX_COLUMNS = 256;

float number(Number kind, u32 x) {
  if (kind == Number::tf32) return f32(x & 0xffffe000u);  // the lowest 13 bits are not read
  return kind == Number::bf16 ? bf16(u16(x)) : f16(u16(x));
}

int width(Number kind) { return kind == Number::tf32 ? 4 : 2; }

// "Matrix Fragments for mma.m16n8k16" and its like: lane 4g + q holds of every 8 rows row g, and of
// every 8 columns of 16 bits (4 of 32 bits) the pair q (the element q).
void left_fragment(const Warp& w, Number kind, int depth, const int* a, float tile[16][MAX_DEPTH]) {
  int each = width(kind) == 2 ? 2 : 1;
  for (int i = 0; i < depth / each / 2; i++) EACH
    for (int half = 0; half < each; half++)
      tile[l / 4 + 8 * (i % 2)][(l % 4) * each + half + 4 * each * (i / 2)] =
          number(kind, w.r[a[i]][l] >> 16 * half);
}

// "Asynchronous Warpgroup Level Matrix Instructions", matrix descriptor and shared memory layouts:
// start address, leading and stride byte offsets in units of 16 bytes, and the swizzle, which
// exchanges units of 16 bytes within rows of 128, 64 or 32 bytes. `index` counts rows of A or
// columns of B, whose elements lie one after another along `k` unless the matrix is transposed.
u32 described(u64 descriptor, int index, int k, int bytes, bool transposed) {
  u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  u32 stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62;
  u32 row = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32, address = start;
  if (transposed) {
    int wide = row / bytes;
    address += index / wide * leading + k / 8 * stride + k % 8 * row + index % wide * bytes;
  } else if (mode == 0) {
    address += index / 8 * stride + index % 8 * 16 + k * bytes / 16 * leading + k * bytes % 16;
  } else {
    address += index / 8 * stride + index % 8 * row + k * bytes;
  }
  u32 mask = mode == 0 ? 0 : mode == 1 ? 7 : mode == 2 ? 3 : 1;
  return address ^ (address >> 7 & mask) << 4;
}

float element(Warp& w, Number kind, u64 descriptor, int index, int k, bool transposed, int line) {
  u32 x = 0;
  u32 address = described(descriptor, index, k, width(kind), transposed);
  std::memcpy(&x, shared(w, address, width(kind), line), width(kind));
  return number(kind, x);
}

// "Register Fragments" of D in both: pairs of columns of rows g and g + 8, for every 8 columns.
void multiply(Warp& w, int depth, int columns, const int* d, const int* c, bool accumulate,
              const float a[16][MAX_DEPTH], const float b[MAX_DEPTH][MAX_COLUMNS]) {
  for (int i = 0; i < columns / 2; i++) EACH {
    int row = l / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + i % 2 + 2 * (l % 4);
    double sum = accumulate ? f32(w.r[c[i]][l]) : 0.0;
    for (int k = 0; k < depth; k++) sum += double(a[row][k]) * b[k][column];
    w.r[d[i]][l] = bits(float(sum));
  }
}

void wgmma(Warp& w, Wgmma x, const int* d, const float a[16][MAX_DEPTH], u64 b_descriptor,
           int line) {
  static float b[MAX_DEPTH][MAX_COLUMNS];
  for (int n = 0; n < x.columns; n++)
    for (int k = 0; k < x.depth; k++)
      b[k][n] = element(w, x.kind, b_descriptor, n, k, x.transpose_b, line);
  multiply(w, x.depth, x.columns, d, d, x.accumulate, a, b);
}

}  // namespace

void mma(Warp& w, Number kind, int depth, const int* d, const int* a, const int* b, const int* c) {
  float left[16][MAX_DEPTH];
  static float right[MAX_DEPTH][MAX_COLUMNS];
  int each = width(kind) == 2 ? 2 : 1;
  left_fragment(w, kind, depth, a, left);
  for (int i = 0; i < depth / each / 4; i++) EACH
    for (int half = 0; half < each; half++)
      right[(l % 4) * each + half + 4 * each * i][l / 4] = number(kind, w.r[b[i]][l] >> 16 * half);
  multiply(w, depth, 8, d, c, true, left, right);
}

void wgmma(Warp& w, Wgmma x, const int* d, const int* a, u64 b_descriptor, int line) {
  float left[16][MAX_DEPTH];
  left_fragment(w, x.kind, x.depth, a, left);
  wgmma(w, x, d, left, b_descriptor, line);
}

// The four warps of a warpgroup have 16 rows of A each.
void wgmma(Warp& w, Wgmma x, const int* d, u64 a_descriptor, u64 b_descriptor, int line) {
  float left[16][MAX_DEPTH];
  int top = 16 * int(w.thread / LANES % 4);
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < x.depth; k++)
      left[row][k] = element(w, x.kind, a_descriptor, top + row, k, x.transpose_a, line);
  wgmma(w, x, d, left, b_descriptor, line);
}

namespace {

constexpr long PATIENCE = 300'000;  // turns in which no warp writes or ends
constexpr size_t MANY = 4096;       // stores that a CTA keeps to itself

void start(Cta& cta, unsigned warps, unsigned shared_bytes, const u32 index[3], const u32 grid[3],
           void** params) {
  cta.memory.assign(shared_bytes, 0xff);  // NaN, like the registers
  cta.live = warps;
  cta.members.resize(warps);
  for (unsigned i = 0; i < warps; i++) {
    Member& m = cta.members[i];
    m.r.assign(COUNTS[0] * LANES, ~0u);
    m.d.assign(COUNTS[1] * LANES, ~0ull);
    m.h.assign(COUNTS[2] * LANES, u16(~0u));
    m.p.assign(COUNTS[3] * LANES, 0);
    m.warp = {reinterpret_cast<u32(*)[LANES]>(m.r.data()),
              reinterpret_cast<u64(*)[LANES]>(m.d.data()),
              reinterpret_cast<u16(*)[LANES]>(m.h.data()),
              reinterpret_cast<u8(*)[LANES]>(m.p.data()),
              0, State::running, LANES * i, {index[0], index[1], index[2]},
              {grid[0], grid[1], grid[2]}, params, &cta};
  }
}

void order(Cta& cta) {
  for (Member& m : cta.members) {
    cta.pending.insert(cta.pending.end(), m.pending.begin(), m.pending.end());
    m.pending.clear();
  }
}

// All warps have arrived at a barrier: they go on, and what was stored may become visible, or not.
void pass(Cta& cta, std::vector<Warp*>& running) {
  if (cta.live != cta.members.size()) fail("barrier after some warps have ended", 0, cta.live);
  order(cta);
  for (Member& m : cta.members) {
    m.warp.state = State::running;
    running.push_back(&m.warp);
  }
  cta.waiting = 0;
  if (cta.pending.size() > MANY || chance(64)) publish(cta, cta.pending);
}

void run_all(std::vector<Warp*>& running) {
  idle_turns = 0;
  while (!running.empty()) {
    size_t index = draw() % running.size();
    Warp& w = *running[index];
    step(w);
    if (w.state == State::done) idle_turns = 0;
    if (++idle_turns > PATIENCE) fail("warps wait for each other in vain", 0);
    if (w.state == State::running) continue;
    running[index] = running.back();
    running.pop_back();
    Cta& cta = *w.cta;
    if (w.state == State::waiting)
      cta.waiting++;
    else
      cta.live--;
    if (cta.live == 0) {
      order(cta);
      publish(cta, cta.pending);
    } else if (cta.waiting == cta.live) {
      pass(cta, running);
    }
  }
}

}  // namespace

// Run a grid to its end: "" or what went wrong. `memory` holds the first address and the end of
// each of `tensors` pieces of memory.
extern "C" const char* run(void** params, const u32 grid[3], unsigned warps, unsigned shared_bytes,
                           const u64* memory, int tensors, u64 seed) {
  random_state = seed * 2654435761ull + 88172645463325252ull;
  message[0] = 0;
  ranges.clear();
  for (int i = 0; i < tensors; i++) ranges.push_back({memory[2 * i], memory[2 * i + 1]});
  std::vector<Cta> ctas(size_t(grid[0]) * grid[1] * grid[2]);
  std::vector<Warp*> running;
  for (u32 i = 0; i < ctas.size(); i++) {
    u32 index[3] = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
    start(ctas[i], warps, shared_bytes, index, grid, params);
    for (Member& m : ctas[i].members) running.push_back(&m.warp);
  }
  try {
    run_all(running);
  } catch (const Failure&) {
  }
  return message;
}
