// What a translated kernel is made of: the registers of a warp, and what its instructions call.
//
// A warp runs in lockstep: each instruction is done for its 32 lanes before the next one. Titles in
// quotation marks are those of sections of the PTX ISA manual.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;

constexpr int LANES = 32;

struct Cta;
enum class State { running, waiting, done };

struct Warp {
  u32 (*r)[LANES];
  u64 (*d)[LANES];
  u16 (*h)[LANES];
  u8 (*p)[LANES];
  int resume;  // where `step` goes on: 0, or the line of the PAUSE it left by
  State state;
  u32 thread;  // %tid.x of lane 0
  u32 cta_index[3], grid[3];
  void** params;
  Cta* cta;
};

// Leave `step`, whose body is one switch over `resume`, and go on behind this line later.
#define PAUSE(next)      \
  {                      \
    w.resume = __LINE__; \
    w.state = next;      \
    return;              \
  }                      \
  case __LINE__:;
#define EACH for (int l = 0; l < LANES; l++)

// What the translation defines.
extern const int COUNTS[4];  // of registers of 32, 64 and 16 bits, and of predicates
void step(Warp& w);          // until the next PAUSE, or the end

[[noreturn]] void fail(const char* what, int line, u64 a = 0, u64 b = 0);
bool chance(u32 one_in);

template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float f32(u32 x) { return same_bits<float>(x); }
inline double f64(u64 x) { return same_bits<double>(x); }
inline u32 bits(float f) { return same_bits<u32>(f); }
inline u64 bits64(double f) { return same_bits<u64>(f); }
inline float bf16(u16 x) { return f32(u32(x) << 16); }
float f16(u16 x);
u16 to_bf16(float f);  // to nearest, ties to even; NaN is 0x7fff, as for cvt
u16 to_f16(float f);
u32 to_tf32(u32 x);  // cvt.rna: to nearest, ties away from zero

// "State Spaces": every access must be inside of memory that the kernel was given, and aligned to
// its size. Loads and stores of one lane; `cache` says what a load may see.
enum class Cache { coherent, l1, never_emptied };
void load(Warp& w, u64 address, void* value, int bytes, int line, Cache cache);
void store(Warp& w, u64 address, const void* value, int bytes, int line);
u8* shared(Warp& w, u32 address, int bytes, int line);
void acquire(Warp& w);
u32 atomic_add(Warp& w, u64 address, u32 value, int line, bool acquires, bool releases);

bool branches(const Warp& w, const u8* predicate, bool wanted, int line);

u32 byte_permute(u32 low, u32 high, u32 selector);
u32 logic3(u32 x, u32 y, u32 z, u32 table);
u64 extract_bits(u64 x, u32 position, u32 count, int width, bool is_signed);
u64 insert_bits(u64 field, u64 into, u32 position, u32 count);

u64 uniform(const u64* lanes, int line);  // what all lanes hold

// The operands are numbers of 32-bit registers; `addresses` one shared address of each lane.
enum class Number { bf16, f16, tf32 };
void ldmatrix(Warp& w, const u32* addresses, const int* to, int count, bool transposed, int line);
void stmatrix(Warp& w, const u32* addresses, const int* from, int count, bool transposed, int line);
void mma(Warp& w, Number kind, int depth, const int* d, const int* a, const int* b, const int* c);
struct Wgmma {
  Number kind;
  int columns, depth;
  bool accumulate, transpose_a, transpose_b;
};
void wgmma(Warp& w, Wgmma what, const int* d, const int* a, u64 b_descriptor, int line);
void wgmma(Warp& w, Wgmma what, const int* d, u64 a_descriptor, u64 b_descriptor, int line);
