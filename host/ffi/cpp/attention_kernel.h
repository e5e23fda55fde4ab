// Causal attention of one document and one key-value head on one core. fp32 inside, whatever the tensors hold.
#pragma once

#include "vectors.h"

namespace host::kernels {

// Strides are in elements, from one token to the next; pointers are those of the document's first token and of the
// group's first query head (q, out, dq, lse) or its key-value head (k, v, dk, dv). Query heads follow each other.
struct AttentionShape {
  size_t length, width;        // tokens, head dim
  size_t q_stride, kv_stride;  // of q, out, dout, dq; of k, v
  size_t lse_stride;           // of lse: the number of query heads
  size_t heads;                // query heads to do, all of which share k and v
  float scale;
};

// Floats of scratch one call needs.
size_t attention_scratch(size_t length, size_t width);

// out = softmax(scale q k^T) v, and the log of the softmax's denominator per token and head.
void attention_forward(const AttentionShape& shape, const float* q, const float* k, const float* v, float* out,
                       float* lse, float* scratch);
void attention_forward(const AttentionShape& shape, const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse,
                       float* scratch);

// Writes dq, and dk and dv in fp32 (same strides as k and v), summed over the heads of this call.
void attention_backward(const AttentionShape& shape, const float* dout, const float* q, const float* k, const float* v,
                        const float* out, const float* lse, float* dq, float* dk, float* dv, float* scratch);
void attention_backward(const AttentionShape& shape, const bf16* dout, const bf16* q, const bf16* k, const bf16* v,
                        const bf16* out, const float* lse, bf16* dq, float* dk, float* dv, float* scratch);

}  // namespace host::kernels
