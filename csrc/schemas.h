// What every op takes and returns: for the library `coterie`, and for those that tests make.
#pragma once

#include <string>

namespace coterie {

// The fused kernels whose tiles have so many columns.
template <class Library>
void define_fused(Library& m, const std::string& columns) {
  const std::string of_rows = "(Tensor table, Tensor like, int blocks, int communication) -> ()";
  for (const std::string name : {"dispatch", "dispatch_backward", "combine"}) {
    m.def(("fused_" + name + "_" + columns + of_rows).c_str());
  }
  m.def(
      ("fused_combine_backward_" + columns +
       "(Tensor table, Tensor table_out, Tensor table_in, Tensor like, int blocks, "
       "int communication) -> ()")
          .c_str());
  m.def(
      ("fused_weight_gradient_" + columns + "(Tensor table, Tensor like, int blocks) -> ()")
          .c_str());
}

template <class Library>
void define_ops(Library& m) {
  m.def("permute(Tensor x, Tensor token, Tensor? weight) -> Tensor");
  m.def("unpermute(Tensor x, Tensor? weight, Tensor row, Tensor offset) -> Tensor");
  m.def("unpermute_backward(Tensor dy, Tensor x, Tensor weight, Tensor token) -> (Tensor, Tensor)");
  m.def("invert(Tensor token, int num_tokens) -> (Tensor, Tensor)");
  m.def(
      "gate(Tensor logits, Tensor? bias, int k, bool sigmoid, bool renormalise, float scale, "
      "int groups, int top_groups) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gate_backward(Tensor? dweight, Tensor? dscore, Tensor score, Tensor expert, bool sigmoid, "
      "bool renormalise, float scale) -> Tensor");
  m.def("sort_by_expert(Tensor expert, int num_experts, Tensor? keep) -> (Tensor, Tensor)");
  m.def("swiglu(Tensor h) -> Tensor");
  m.def("swiglu_backward(Tensor da, Tensor h) -> (Tensor, Tensor)");
  m.def(
      "fused_plan(Tensor load, Tensor visit, Tensor begin, Tensor before, Tensor weight, int rank, "
      "int run, Tensor(a!) place, Tensor(b!) global_visit, Tensor(c!) source, Tensor(d!) row, "
      "Tensor(e!) pool_weight, Tensor(f!) tile, Tensor(g!) span) -> ()");
  for (const char* columns : {"128", "256"}) define_fused(m, columns);
}

}  // namespace coterie
