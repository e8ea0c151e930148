// The library's face: picks the build for this CPU and hands problems to it.
#include <stddef.h>
#include <string.h>

#include "features.h"
#include "problem.h"
#include "threads.h"

#define EXPORT __attribute__((visibility("default")))

typedef int entry(const ea_problem *);
typedef int step_entry(const ea_token *);

#define DECLARE(build)                                                                               \
  entry ea_forward_##build, ea_backward_##build, ea_linear_##build, ea_linear_backward_##build; \
  step_entry ea_step_##build;
DECLARE(portable)
#ifdef EA_HAVE_V3
DECLARE(v3)
#endif
#ifdef EA_HAVE_V4
DECLARE(v4)
#endif
#ifdef EA_HAVE_V4_BF16
DECLARE(v4_bf16)
#endif

typedef struct {
  const char *name;
  int (*runs_here)(void);
  entry *forward, *backward, *linear, *linear_backward;
  step_entry *step;
} build;

// The best last.
#define BUILD(name, runs_here, build) \
  {name, runs_here, ea_forward_##build, ea_backward_##build, ea_linear_##build, ea_linear_backward_##build, ea_step_##build},
static const build builds[] = {
    BUILD("portable", always, portable)
#ifdef EA_HAVE_V3
    BUILD("x86-64-v3", has_v3, v3)
#endif
#ifdef EA_HAVE_V4
    BUILD("x86-64-v4", has_v4, v4)
#endif
#ifdef EA_HAVE_V4_BF16
    BUILD("x86-64-v4-bf16", has_v4_bf16, v4_bf16)
#endif
};

static const int count = sizeof builds / sizeof *builds;

// The name of the i-th build that runs on this CPU, the best last; NULL: there are no more.
EXPORT const char *ea_build_name(int i) {
  for (int j = 0; j < count; j++) {
    if (builds[j].runs_here() && i-- == 0) return builds[j].name;
  }
  return NULL;
}

// The members of `ea_problem` and `ea_token`: a version, then name and format of each.
#define MEMBER(format, type, name, size) #name ":" #format " "
EXPORT const char *ea_layout(void) { return EA_VERSION " " EA_MEMBERS(MEMBER) "; " EA_TOKEN_MEMBERS(MEMBER); }

#define BYTES(format, type, name, size) + sizeof(((ea_problem *)0)->name)
_Static_assert(sizeof(ea_problem) == EA_MEMBERS(BYTES), "the members of ea_problem have no gaps");
#define TOKEN_BYTES(format, type, name, size) + sizeof(((ea_token *)0)->name)
_Static_assert(sizeof(ea_token) == EA_TOKEN_MEMBERS(TOKEN_BYTES), "the members of ea_token have no gaps");
_Static_assert(sizeof(void *) == 8 && sizeof(ea_tensor) == 5 * 8, "addresses are as wide as numbers");

// The builds that the compiler could not make, each followed by a space.
EXPORT const char *ea_left_out(void) {
  return ""
#ifdef __x86_64__
#ifndef EA_HAVE_V3
         "x86-64-v3 "
#endif
#ifndef EA_HAVE_V4
         "x86-64-v4 "
#endif
#ifndef EA_HAVE_V4_BF16
         "x86-64-v4-bf16 "
#endif
#endif
      ;
}

static const build *find(const char *name) {
  for (int j = 0; j < count; j++) {
    if (strcmp(builds[j].name, name) == 0) return &builds[j];
  }
  return NULL;
}

EXPORT void *ea_forward(const char *name) { return (void *)find(name)->forward; }
EXPORT void *ea_backward(const char *name) { return (void *)find(name)->backward; }
EXPORT void *ea_linear(const char *name) { return (void *)find(name)->linear; }
EXPORT void *ea_linear_backward(const char *name) { return (void *)find(name)->linear_backward; }
EXPORT void *ea_step(const char *name) { return (void *)find(name)->step; }
EXPORT void ea_set_openmp(void *gomp_parallel) { ea_use_openmp(gomp_parallel); }
