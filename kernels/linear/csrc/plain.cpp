// For any processor: vectors of four floats, which SSE2 and NEON have.

#include "call.h"
#include "scratch.h"

#define SET plain
#define LANES 4
#define TILE 4
#define LAYOUT "floats.h"
#include "linear.h"
#include "backward.h"

namespace swin {

const Code kPlain{LANES, plain::kPanel, TILE, plain::panel_size, plain::pack, plain::product, plain::few_rows, plain::mlp,
                  plain::mlp_gradient, plain::weight_gradient, plain::add_parts};

}  // namespace swin
