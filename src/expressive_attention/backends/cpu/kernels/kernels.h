// The parts in the order in which they build on one another. REAL is the type of all arithmetic.
#include "problem.h"
#include "threads.h"
//
#include "simd.h"
#include "shuffle.h"
//
#include "arena.h"
#include "convert.h"
#include "sequences.h"
#include "entry.h"
#include "pack.h"
#include "blocks.h"
#include "share.h"
#include "tile.h"
#include "visible.h"
#include "dropout.h"
//
#include "few_rows.h"
#include "pairs.h"
#include "forward.h"
#include "one_row.h"
#include "linear.h"
#include "step.h"
//
#include "finite.h"
#include "backward.h"
#include "linear_backward.h"
