// For any processor: vectors of four floats, which SSE2 and NEON have.

#include "call.h"
#include "scratch.h"

#define SET plain
#define LANES 4
#define ROWS 4
#include "windows.h"

namespace swin {

const Code kPlain{LANES, plain::forward<float>, plain::backward<float>,
                  plain::forward<plain::BFloat16>, plain::backward<plain::BFloat16>};

}  // namespace swin
