// Which levels of CPU features this machine has, as the builds need them (CMakeLists.txt).
// Read from the CPU: __builtin_cpu_supports needs a runtime that some compilers lack, and Zig's answers no to everything.
#include <stdint.h>

static inline int always(void) { return 1; }

#ifdef __x86_64__
#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };

// Whether all these bits are set in a register of a leaf of CPUID. A leaf that the CPU does not have is all zeros.
static inline int has(unsigned leaf, unsigned part, int where, uint32_t bits) {
  unsigned r[4] = {0};
  return __get_cpuid_count(leaf, part, r + EAX, r + EBX, r + ECX, r + EDX) && (r[where] & bits) == bits;
}

#define BIT(i) (UINT32_C(1) << (i))

// Whether the operating system keeps these registers (bits of XCR0) when it switches between threads.
static inline int keeps(uint32_t registers) {
  if (!has(1, 0, ECX, BIT(27))) return 0;  // OSXSAVE: XCR0 can be read
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}

static inline int has_v3(void) {
  uint32_t first = BIT(12) | BIT(13) | BIT(20) | BIT(22) | BIT(23) | BIT(28) | BIT(29);  // FMA, CX16, SSE4.2, MOVBE, POPCNT, AVX, F16C
  uint32_t seventh = BIT(3) | BIT(5) | BIT(8);                                           // BMI1, AVX2, BMI2
  uint32_t extended = BIT(0) | BIT(5);                                                   // LAHF, LZCNT
  return keeps(0x6) && has(1, 0, ECX, first) && has(7, 0, EBX, seventh) && has(0x80000001, 0, ECX, extended);
}

static inline int has_v4(void) {
  uint32_t seventh = BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31);  // AVX-512 F, DQ, CD, BW, VL
  return has_v3() && keeps(0xe6) && has(7, 0, EBX, seventh);
}

static inline int has_v4_bf16(void) { return has_v4() && has(7, 1, EAX, BIT(5)); }
#endif
