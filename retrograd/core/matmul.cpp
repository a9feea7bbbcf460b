// Products of float32 matrices on a CPU by oneDNN. Compiled and loaded by matmul.py.
//
// While it is on, aten::mm, aten::addmm and aten::bmm of such matrices go to torch's own call of oneDNN, which torch keeps
// to half precision; everything else, and everything while it is off, goes where it went before.
//
// oneDNN compiles code for every size and keeps it, about 0.6 MB each. So the size that varies from batch to batch, the
// number of tokens, is cut into pieces of few sizes: what the rows of a row-major first factor count (x Wᵀ, g W), or those
// of both factors (gᵀ x). What is left goes with tokens before it if that is most of a piece, and to torch if not. Products
// of many small matrices (attention) are not cut, and taken where their sizes are round: those of packed rows are.

#include <ATen/CPUFunctions.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
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

// How much of a size goes together: a multiple of a power of two, of which there are eight to an octave.
int64_t piece(int64_t size) {
  int64_t step = kStep;
  while (step * 16 <= size) step *= 2;
  return size - size % step;
}

Tensor fresh(int64_t rows, int64_t columns) { return at::detail::empty_cpu({rows, columns}, at::kFloat); }

// What a few tokens at the end add, by a piece with tokens before them, which then do not count.
void rest(int along, const Tensor& a, const Tensor& b, const Tensor& to, int64_t count, int64_t wide, float beta) {
  const int64_t start = a.size(along) - wide;
  const Tensor left = a.narrow(along, start, wide);
  if (along == 0) {
    const Tensor found = fresh(wide, b.size(1));
    at::native::mkldnn_matmul(left, b, found, 0.f, 1.f);
    const Tensor last = found.narrow(0, wide - count, count);
    if (beta == 0.f) to.copy_(last);
    else to.add_(last);
  } else {
    const Tensor right = fresh(wide, b.size(1));
    right.narrow(0, 0, wide - count).zero_();
    right.narrow(0, wide - count, count).copy_(b.narrow(0, b.size(0) - count, count));
    at::native::mkldnn_matmul(left, right, to, beta, 1.f);
  }
}

// out = beta·out + a b, beta 0 or 1
void product(int along, const Tensor& a, const Tensor& b, const Tensor& out, float beta) {
  const int64_t size = a.size(along), least = std::max(kStep, kLeast / (a.size(1 - along) * b.size(1)));
  for (int64_t start = 0, count; start < size; start += count) {
    const bool ours = size - start >= least;
    count = ours ? piece(size - start) : size - start;
    const Tensor left = a.narrow(along, start, count);
    const Tensor right = along == 0 ? b : b.narrow(0, start, count);
    Tensor to = along == 0 ? out.narrow(0, start, count) : out;
    const float before = along == 1 && start > 0 ? 1.f : beta;
    if (ours) at::native::mkldnn_matmul(left, right, to, before, 1.f);
    else if (least == kStep && 2 * count >= least) rest(along, a, b, to, count, least, before);
    else if (before == 0.f) at::cpu::mm_out(to, left, right);
    else at::cpu::addmm_(to, left, right, before, 1);
  }
}

Tensor mm(const Tensor& a, const Tensor& b) {
  const int along = cut(a, b);
  if (along < 0) return at::cpu::mm(a, b);
  Tensor out = fresh(a.size(0), b.size(1));
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
  Tensor out = fresh(a.size(0), b.size(1));
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

// Also one less: of rows of a round length the last token predicts nothing, and its state is not computed.
bool round(int64_t size) {
  const int64_t step = size > 128 ? 64 : 16;
  return size % step == 0 || (size + 1) % step == 0;
}

bool dense(const Tensor& x) {
  const bool rows = x.stride(2) == 1 && x.stride(1) == x.size(2), columns = x.stride(1) == 1 && x.stride(2) == x.size(1);
  return (rows || columns) && x.stride(0) == x.size(1) * x.size(2);
}

bool batched(const Tensor& a, const Tensor& b) {
  if (!on || !plain(a) || !plain(b) || a.dim() != 3 || b.dim() != 3 || a.size(0) != b.size(0) || a.size(2) != b.size(1))
    return false;
  const int64_t m = a.size(1), k = a.size(2), n = b.size(2);
  return m && k && n && round(m) && round(k) && round(n) && a.size(0) * m * k * n >= kLeast && dense(a) && dense(b);
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  if (!batched(a, b)) return at::cpu::bmm(a, b);
  Tensor out = at::detail::empty_cpu({a.size(0), a.size(1), b.size(2)}, at::kFloat);
  at::native::mkldnn_matmul(a, b, out, 0.f, 1.f);
  return out;
}

Tensor& bmm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  if (!batched(a, b) || !plain(out) || !out.is_contiguous() || out.sizes() != at::IntArrayRef({a.size(0), a.size(1), b.size(2)}))
    return at::cpu::bmm_out(out, a, b);
  at::native::mkldnn_matmul(a, b, out, 0.f, 1.f);
  return out;
}

struct Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

torch::Library replaced() {
  torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library.impl("mm", mm);
  library.impl("mm.out", mm_out);
  library.impl("addmm", addmm);
  library.impl("addmm.out", addmm_out);
  library.impl("addmm_", addmm_);
  library.impl("bmm", bmm);
  library.impl("bmm.out", bmm_out);
  return library;
}

}  // namespace

// Takes the place of torch's kernels, about which torch would warn.
extern "C" void retrograd_matmul_begin() {
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  static torch::Library library = replaced();
}

extern "C" void retrograd_matmul_use(bool onednn) { on = onednn; }
