// silu(gate) * up and its derivative, of one number each.
#pragma once

#include "../device.cuh"

namespace coterie::fused {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

struct SwigluGradient {
  float act, gate, up;
};

// Given the gradient of the result: the result anew, and the gradients of gate and up.
__device__ __forceinline__ SwigluGradient swiglu_gradient(float gradient, float gate, float up) {
  const float s = sigmoid(gate), silu = gate * s;
  return {silu * up, gradient * up * (s + silu * (1.0f - s)), gradient * silu};
}

}  // namespace coterie::fused
