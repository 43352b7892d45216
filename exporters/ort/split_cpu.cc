#include "split_cpu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace freqopt {
namespace {

constexpr int64_t kKeyBlock = 64, kQueryTile = 128, kSubBlock = 8, kSubTile = 8;
constexpr int64_t kFine = kKeyBlock / kSubBlock, kPerTile = kQueryTile / kSubTile;
constexpr float kMidRatio = 0.25f, kCMax = 2.0f, kGMax = 1.5f;
constexpr int kNewtonSteps = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
enum Band : int8_t { kLow = 0, kMid = 1, kExact = 2 };

using Floats = std::vector<float>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(float* out, float weight, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += weight * x[i];
}

struct Summary {
  std::vector<int64_t> count;
  Floats key_mean, value_mean, key_var, first_order;  // (J, D) each, and (D, D)
};

struct Columns {  // what one query tile attends to
  std::vector<const float*> key, value;
  Floats bias;
  size_t low = 0, mid = 0;  // how many of the leading columns are low, and mid after them
  void push(const float* k, const float* v, float b) {
    key.push_back(k), value.push_back(v), bias.push_back(b);
  }
};

class Head {
 public:
  Head(const Extents& e, const Attributes& a, const HeadInputs& in) : e_(e), a_(a), in_(in) {
    d_ = e.dim, t_ = e.tokens;
    blocks_ = ceil_div(t_, kKeyBlock), tiles_ = ceil_div(t_, kQueryTile);
    query_.resize(t_ * d_), key_.resize(t_ * d_), value_.resize(t_ * d_);
    for (int64_t i = 0; i < t_; ++i) {
      const int64_t row = (in.order[i] + e.text_before) * d_;
      std::copy_n(in.query + row, d_, &query_[i * d_]);
      std::copy_n(in.key + row, d_, &key_[i * d_]);
      std::copy_n(in.value + row, d_, &value_[i * d_]);
    }
    for (int64_t i = 0; i < e.length; ++i) {
      if (i < e.text_before || i >= e.text_before + t_) text_.push_back(i);
    }
  }

  void run(float* out) {
    low_ = summarise(kKeyBlock);
    if (a_.mid_band) fine_ = summarise(kSubBlock);
    pool_tiles();
    score_pairs();
    choose_route();
    if (a_.probes > 0) fit_probe();
    Floats logits;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const Columns columns = columns_of(tile);
      for (int64_t i = tile * kQueryTile; i < std::min(t_, (tile + 1) * kQueryTile); ++i) {
        attend(&query_[i * d_], columns, out + (in_.order[i] + e_.text_before) * d_, logits);
      }
    }
    attend_text(out, logits);
  }

 private:
  bool text_kept(int64_t row) const { return !in_.key_mask || in_.key_mask[row]; }

  Summary summarise(int64_t size) const {
    const int64_t blocks = ceil_div(t_, size);
    Summary s{std::vector<int64_t>(blocks), Floats(blocks * d_), Floats(blocks * d_),
              Floats(blocks * d_), Floats(d_ * d_)};
    Floats offset(d_);
    std::vector<double> order(d_ * d_, 0.0);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t first = j * size, n = std::min(size, t_ - first);
      s.count[j] = n;
      float *k = &s.key_mean[j * d_], *v = &s.value_mean[j * d_], *var = &s.key_var[j * d_];
      for (int64_t i = first; i < first + n; ++i) {
        add_scaled(k, 1.0f, &key_[i * d_], d_), add_scaled(v, 1.0f, &value_[i * d_], d_);
      }
      for (int64_t c = 0; c < d_; ++c) k[c] /= n, v[c] /= n;
      Floats block(d_ * d_, 0.0f);
      for (int64_t i = first; i < first + n; ++i) {
        for (int64_t c = 0; c < d_; ++c) {
          offset[c] = key_[i * d_ + c] - k[c];
          var[c] += offset[c] * offset[c];
        }
        for (int64_t c = 0; c < d_; ++c) {
          add_scaled(&block[c * d_], value_[i * d_ + c], offset.data(), d_);
        }
      }
      for (int64_t c = 0; c < d_; ++c) var[c] /= n;
      for (int64_t c = 0; c < d_ * d_; ++c) order[c] += block[c];
    }
    for (int64_t c = 0; c < d_ * d_; ++c) s.first_order[c] = float(order[c] / t_);
    return s;
  }

  Floats value_spread() const {
    std::vector<double> mean(d_, 0.0);
    for (int64_t i = 0; i < t_ * d_; ++i) mean[i % d_] += value_[i];
    for (double& m : mean) m /= t_;
    double head = 0;
    for (int64_t i = 0; i < t_ * d_; ++i) {
      const double off = value_[i] - mean[i % d_];
      head += off * off;
    }
    head = std::max(head / t_, 1e-30);
    Floats spread(blocks_);
    for (int64_t j = 0; j < blocks_; ++j) {
      double sum = 0;
      for (int64_t i = j * kKeyBlock; i < j * kKeyBlock + low_.count[j]; ++i) {
        for (int64_t c = 0; c < d_; ++c) {
          const double off = value_[i * d_ + c] - low_.value_mean[j * d_ + c];
          sum += off * off;
        }
      }
      spread[j] = float(std::sqrt(sum / low_.count[j] / head));
    }
    return spread;
  }

  void score_pairs() {
    const Floats spread = value_spread();
    score_.assign(tiles_ * blocks_, 0.0f), term_.assign(tiles_ * blocks_, 0.0f);
    Floats mean(d_), pooled(blocks_), dispersion(blocks_);
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      float *score = &score_[tile * blocks_], *term = &term_[tile * blocks_];
      for (int64_t j = 0; j < blocks_; ++j) {
        const float sum = dot(&square_[tile * d_], &low_.key_var[j * d_], d_);
        dispersion[j] = sum * a_.scale * a_.scale;
        term[j] = std::min(0.5f * dispersion[j], std::log(float(low_.count[j])));
      }
      int64_t present = 0;
      for (int64_t sub = tile * kPerTile; sub < (tile + 1) * kPerTile; ++sub) {
        const int64_t n = std::min(kSubTile, t_ - sub * kSubTile);
        if (n <= 0) break;
        ++present;
        std::fill(mean.begin(), mean.end(), 0.0f);
        for (int64_t i = sub * kSubTile; i < sub * kSubTile + n; ++i) {
          for (int64_t c = 0; c < d_; ++c) mean[c] += query_[i * d_ + c];
        }
        for (int64_t c = 0; c < d_; ++c) mean[c] /= n;
        float peak = -kInfinity;
        for (int64_t j = 0; j < blocks_; ++j) {
          pooled[j] = dot(mean.data(), &low_.key_mean[j * d_], d_) * a_.scale +
                      std::log(float(low_.count[j])) + term[j];
          peak = std::max(peak, pooled[j]);
        }
        double total = 0;
        for (float x : pooled) total += std::exp(x - peak);
        for (int64_t j = 0; j < blocks_; ++j) {
          const float mass = float(std::exp(pooled[j] - peak) / total);
          score[j] += mass * mass;
        }
      }
      for (int64_t j = 0; j < blocks_; ++j) {
        score[j] = std::sqrt(score[j] / present * dispersion[j]) * spread[j] * blocks_;
      }
    }
  }

  static bool own(int64_t tile, int64_t block) { return block * kKeyBlock / kQueryTile == tile; }

  void choose_route() {
    float exact_from = in_.exact_from, mid_from = in_.mid_from;
    if (a_.density > 0) {
      Floats sorted(score_);
      for (int64_t p = 0; p < tiles_ * blocks_; ++p) {
        if (own(p / blocks_, p % blocks_)) sorted[p] = kInfinity;
      }
      const int64_t kept = exact_pairs(a_.density, int64_t(sorted.size()));
      std::nth_element(sorted.begin(), sorted.begin() + (kept - 1), sorted.end(),
                       std::greater<float>());
      exact_from = sorted[kept - 1], mid_from = exact_from * kMidRatio;
    }
    if (!a_.mid_band) mid_from = exact_from;
    route_.resize(score_.size());
    for (int64_t p = 0; p < tiles_ * blocks_; ++p) {
      const bool exact = score_[p] >= exact_from || own(p / blocks_, p % blocks_);
      route_[p] = exact ? kExact : score_[p] >= mid_from ? kMid : kLow;
    }
  }

  void pool_tiles() {  // mean squared query of each tile, for dispersions and mass terms
    square_.assign(tiles_ * d_, 0.0f);
    for (int64_t i = 0; i < t_; ++i) {
      const int64_t tile = i / kQueryTile, n = std::min(kQueryTile, t_ - tile * kQueryTile);
      for (int64_t c = 0; c < d_; ++c) {
        square_[tile * d_ + c] += query_[i * d_ + c] * query_[i * d_ + c] / n;
      }
    }
  }

  float fine_term(int64_t tile, int64_t j) const {
    const float spread = dot(&square_[tile * d_], &fine_.key_var[j * d_], d_);
    return std::min(0.5f * a_.scale * a_.scale * spread, std::log(float(fine_.count[j])));
  }

  // Approximate columns of a tile with their mass terms, low ones first, at c = 0.
  Columns approximate(int64_t tile, Floats& terms) const {
    Columns columns;
    terms.clear();
    for (int64_t j = 0; j < blocks_; ++j) {
      if (route_[tile * blocks_ + j] != kLow) continue;
      columns.push(&low_.key_mean[j * d_], &low_.value_mean[j * d_],
                   std::log(float(low_.count[j])));
      terms.push_back(term_[tile * blocks_ + j]);
    }
    columns.low = columns.key.size();
    for (int64_t j = 0; j < blocks_; ++j) {
      if (route_[tile * blocks_ + j] != kMid) continue;
      for (int64_t f = j * kFine; f < std::min<int64_t>((j + 1) * kFine, fine_.count.size()); ++f) {
        columns.push(&fine_.key_mean[f * d_], &fine_.value_mean[f * d_],
                     std::log(float(fine_.count[f])));
        terms.push_back(fine_term(tile, f));
      }
    }
    columns.mid = columns.key.size() - columns.low;
    return columns;
  }

  Columns columns_of(int64_t tile) const {
    Floats terms;
    Columns columns = approximate(tile, terms);
    for (size_t i = 0; i < terms.size(); ++i) columns.bias[i] += c_ * terms[i];
    for (int64_t j = 0; j < blocks_; ++j) {
      if (route_[tile * blocks_ + j] != kExact) continue;
      for (int64_t i = j * kKeyBlock; i < std::min(t_, (j + 1) * kKeyBlock); ++i) {
        columns.push(&key_[i * d_], &value_[i * d_], 0.0f);
      }
    }
    for (int64_t row : text_) {
      if (text_kept(row)) columns.push(in_.key + row * d_, in_.value + row * d_, 0.0f);
    }
    return columns;
  }

  // First-order term of one query: (low H_low + mid H_mid) q * scale.
  void add_first_order(const float* query, float low, float mid, float* out) const {
    for (int64_t c = 0; c < d_; ++c) {
      float turned = low * dot(&low_.first_order[c * d_], query, d_);
      if (a_.mid_band) turned += mid * dot(&fine_.first_order[c * d_], query, d_);
      out[c] += turned * a_.scale;
    }
  }

  void attend(const float* query, const Columns& columns, float* out, Floats& logits) const {
    const size_t n = columns.key.size();
    logits.resize(n);
    float peak = -kInfinity;
    for (size_t i = 0; i < n; ++i) {
      logits[i] = dot(query, columns.key[i], d_) * a_.scale + columns.bias[i];
      peak = std::max(peak, logits[i]);
    }
    double total = 0, low = 0, mid = 0;
    std::fill_n(out, d_, 0.0f);
    for (size_t i = 0; i < n; ++i) {
      const float weight = std::exp(logits[i] - peak);
      total += weight;
      if (i < columns.low) low += weight;
      else if (i < columns.low + columns.mid) mid += weight;
      add_scaled(out, weight, columns.value[i], d_);
    }
    if (low + mid > 0) add_first_order(query, g_ * float(low), g_ * float(mid), out);
    const float factor = float(1.0 / total);
    for (int64_t c = 0; c < d_; ++c) out[c] *= factor;
  }

  struct Probe {  // one probe: masses and outputs relative to its softmax sum
    Floats relative, term, truth, exact_out;
    Columns columns;
    double exact_mass = 0, missing = 0;
  };

  Probe observe(int64_t position) const {
    Probe p;
    const float* query = &query_[position * d_];
    const int64_t tile = position / kQueryTile;
    std::vector<const float*> values;
    Floats logits;
    std::vector<bool> exact;
    for (int64_t i = 0; i < t_; ++i) {
      logits.push_back(dot(query, &key_[i * d_], d_) * a_.scale);
      values.push_back(&value_[i * d_]);
      exact.push_back(route_[tile * blocks_ + i / kKeyBlock] == kExact);
    }
    for (int64_t row : text_) {
      if (!text_kept(row)) continue;
      logits.push_back(dot(query, in_.key + row * d_, d_) * a_.scale);
      values.push_back(in_.value + row * d_), exact.push_back(true);
    }
    const float peak = *std::max_element(logits.begin(), logits.end());
    double total = 0;
    for (float x : logits) total += std::exp(double(x - peak));
    const float log_total = peak + float(std::log(total));
    p.truth.assign(d_, 0.0f), p.exact_out.assign(d_, 0.0f);
    for (size_t i = 0; i < logits.size(); ++i) {
      const float share = std::exp(logits[i] - log_total);
      add_scaled(p.truth.data(), share, values[i], d_);
      if (!exact[i]) {
        p.missing += share;
        continue;
      }
      p.exact_mass += share;
      add_scaled(p.exact_out.data(), share, values[i], d_);
    }
    p.columns = approximate(tile, p.term);
    for (size_t i = 0; i < p.columns.key.size(); ++i) {
      p.relative.push_back(dot(query, p.columns.key[i], d_) * a_.scale + p.columns.bias[i] -
                           log_total);
    }
    return p;
  }

  void fit_probe() {
    const int64_t probes = std::min(a_.probes, t_);
    std::vector<Probe> seen;
    std::vector<int64_t> positions;
    double target = 0;
    for (int64_t i = 0; i < probes; ++i) {
      positions.push_back((2 * i + 1) * t_ / (2 * probes));
      seen.push_back(observe(positions.back()));
      target += seen.back().missing;
    }
    double c = 1.0;
    for (int step = 0; step < kNewtonSteps; ++step) {
      double total = 0, slope = 0;
      for (const Probe& p : seen) {
        for (size_t i = 0; i < p.relative.size(); ++i) {
          const double mass = std::exp(p.relative[i] + c * p.term[i]);
          total += mass, slope += mass * p.term[i];
        }
      }
      if (slope > 1e-12 && target > 1e-12) {
        c -= std::log(std::max(total, 1e-30) / target) * total / slope;
      }
      c = std::min(std::max(c, 0.0), double(kCMax));
    }
    double energy = 0, aligned = 0;
    Floats plain(d_), correction(d_);
    for (int64_t i = 0; i < probes; ++i) {
      const Probe& p = seen[i];
      plain = p.exact_out;
      double low = 0, mid = 0;
      for (size_t k = 0; k < p.relative.size(); ++k) {
        const float mass = float(std::exp(p.relative[k] + c * p.term[k]));
        (k < p.columns.low ? low : mid) += mass;
        add_scaled(plain.data(), mass, p.columns.value[k], d_);
      }
      const double total = p.exact_mass + low + mid;
      std::fill(correction.begin(), correction.end(), 0.0f);
      add_first_order(&query_[positions[i] * d_], float(low), float(mid), correction.data());
      for (int64_t k = 0; k < d_; ++k) {
        const double term = correction[k] / total;
        energy += term * term, aligned += (p.truth[k] - plain[k] / total) * term;
      }
    }
    c_ = float(c);
    g_ = energy > 1e-30 ? float(std::min(std::max(aligned / energy, 0.0), double(kGMax))) : 1.0f;
  }

  void attend_text(float* out, Floats& logits) const {
    if (text_.empty()) return;
    Columns columns;
    for (int64_t i = 0; i < t_; ++i) columns.push(&key_[i * d_], &value_[i * d_], 0.0f);
    for (int64_t row : text_) {
      if (text_kept(row)) columns.push(in_.key + row * d_, in_.value + row * d_, 0.0f);
    }
    for (int64_t row : text_) attend(in_.query + row * d_, columns, out + row * d_, logits);
  }

  const Extents& e_;
  const Attributes& a_;
  const HeadInputs& in_;
  int64_t d_, t_, blocks_, tiles_;
  Floats query_, key_, value_, score_, term_, square_;
  std::vector<int64_t> text_;
  std::vector<int8_t> route_;
  Summary low_, fine_;
  float c_ = 1.0f, g_ = 1.0f;
};

}  // namespace

void split_head(const Extents& extents, const Attributes& attributes, const HeadInputs& inputs,
                float* out) {
  Head(extents, attributes, inputs).run(out);
}

}  // namespace freqopt
