// Products of float32 matrices on a CPU by oneDNN. Compiled and loaded by matmul.py.
//
// While it is on, aten::mm and aten::addmm of such matrices go to torch's own call of oneDNN, which torch keeps to half
// precision; everything else, and everything while it is off, goes where it went before.
//
// oneDNN compiles code for every size and keeps it, about 0.6 MB each. So the size that varies from batch to batch, the
// number of tokens, is cut to a multiple of 64 and torch does the rest: that size is what the rows of a row-major first
// factor count (x Wᵀ, g W), or those of both factors (gᵀ x).

#include <ATen/CPUFunctions.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>

namespace at::native {
void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha);
}

namespace {

using at::Scalar;
using at::Tensor;

constexpr int64_t kLeast = 1 << 24;  // multiplications; below, finding the code costs what it saves
constexpr int64_t kStep = 64;

std::atomic<bool> on{false};

bool plain(const Tensor& x) {
  return x.scalar_type() == at::kFloat && x.layout() == at::kStrided && x.device().is_cpu() && !x.is_conj() && !x.is_neg();
}

bool row_major(const Tensor& x) { return x.stride(1) == 1 && x.stride(0) == x.size(1); }

bool column_major(const Tensor& x) { return x.stride(0) == 1 && x.stride(1) == x.size(0); }

// Along which size of a [m, k] a product is cut: 0 for m, 1 for k, -1 if it is not oneDNN's.
int cut(const Tensor& a, const Tensor& b) {
  if (!on || !plain(a) || !plain(b) || a.dim() != 2 || b.dim() != 2 || a.size(1) != b.size(0)) return -1;
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  if (m < kStep || k < kStep || n < kStep || m * k * n < kLeast) return -1;
  if (row_major(a) && (row_major(b) || column_major(b))) return 0;
  return column_major(a) && row_major(b) ? 1 : -1;
}

bool fits(const Tensor& out, const Tensor& a, const Tensor& b) {
  return plain(out) && out.dim() == 2 && out.size(0) == a.size(0) && out.size(1) == b.size(1) && row_major(out);
}

// out = beta·out + a b
void product(int along, const Tensor& a, const Tensor& b, Tensor& out, float beta) {
  const int64_t size = a.size(along), most = size - size % kStep, rest = size - most;
  const Tensor a_most = a.narrow(along, 0, most), a_rest = a.narrow(along, most, rest);
  if (along == 0) {
    at::native::mkldnn_matmul(a_most, b, out.narrow(0, 0, most), beta, 1.f);
    Tensor below = out.narrow(0, most, rest);
    if (rest && beta == 0.f) at::cpu::mm_out(below, a_rest, b);
    else if (rest) at::cpu::addmm_(below, a_rest, b, beta, 1);
  } else {
    at::native::mkldnn_matmul(a_most, b.narrow(0, 0, most), out, beta, 1.f);
    if (rest) at::cpu::addmm_(out, a_rest, b.narrow(0, most, rest), 1, 1);
  }
}

Tensor fresh(const Tensor& a, const Tensor& b) { return at::detail::empty_cpu({a.size(0), b.size(1)}, at::kFloat); }

Tensor mm(const Tensor& a, const Tensor& b) {
  const int along = cut(a, b);
  if (along < 0) return at::cpu::mm(a, b);
  Tensor out = fresh(a, b);
  product(along, a, b, out, 0.f);
  return out;
}

Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  const int along = cut(a, b);
  if (along < 0 || !fits(out, a, b)) return at::cpu::mm_out(out, a, b);
  product(along, a, b, out, 0.f);
  return out;
}

bool simple(const Scalar& beta, const Scalar& alpha) {
  return alpha.toDouble() == 1.0 && (beta.toDouble() == 0.0 || beta.toDouble() == 1.0);
}

bool spreads(const Tensor& x, const Tensor& a, const Tensor& b) {
  return plain(x) && at::is_expandable_to(x.sizes(), {a.size(0), b.size(1)});
}

Tensor addmm(const Tensor& x, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  const int along = cut(a, b);
  if (along < 0 || !simple(beta, alpha) || !spreads(x, a, b)) return at::cpu::addmm(x, a, b, beta, alpha);
  Tensor out = fresh(a, b);
  if (beta.toDouble() != 0.0) out.copy_(x.expand(out.sizes()));
  product(along, a, b, out, beta.toFloat());
  return out;
}

Tensor& addmm_out(
    const Tensor& x, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha, Tensor& out) {
  const int along = cut(a, b);
  if (along < 0 || !simple(beta, alpha) || !spreads(x, a, b) || !fits(out, a, b))
    return at::cpu::addmm_out(out, x, a, b, beta, alpha);
  if (beta.toDouble() != 0.0 && !out.is_same(x)) out.copy_(x.expand(out.sizes()));
  product(along, a, b, out, beta.toFloat());
  return out;
}

Tensor& addmm_(Tensor& x, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  const int along = cut(a, b);
  if (along < 0 || !simple(beta, alpha) || !fits(x, a, b)) return at::cpu::addmm_(x, a, b, beta, alpha);
  product(along, a, b, x, beta.toFloat());
  return x;
}

struct Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

// Called once: takes the place of torch's kernels, about which torch would warn.
extern "C" void retrograd_matmul_begin() {
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library.impl("mm", mm);
  library.impl("mm.out", mm_out);
  library.impl("addmm", addmm);
  library.impl("addmm.out", addmm_out);
  library.impl("addmm_", addmm_);
}

extern "C" void retrograd_matmul_use(bool onednn) { on = onednn; }
