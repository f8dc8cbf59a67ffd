// The choices that define a relation loss, shared by CPU and GPU. Free of torch.
#pragma once

namespace srpkd {

enum class Normalize { row, cosine, none };
enum class Distance { l1, l2, huber };

}  // namespace srpkd
