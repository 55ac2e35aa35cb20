// Loops over the bins of soft ranks: lapsum.h says what they make.

// below[m + 1], above[m]: of the bins up to m and from m on, w e^(-|x_i - x_m| / a). The two take turns, for each of
// their steps waits for the one before, and multiply and add in one step where the processor can.
static void decayed_sums(const Bins& z, const double* w) {
  double below = z.below[0] = 0, above = z.above[z.count] = 0;
  for (int64_t m = 0, k = z.count - 1; m < z.count; ++m, --k) {
    z.below[m + 1] = below = below * z.decay[m] + w[m];
    z.above[k] = above = above * z.decay[k + 1] + w[k];
  }
}

static MeanVariance bin_moments(const Bins& z) {
  double mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t m = 0; m < z.count; ++m) mean += z.mass[m] * z.x[m];
#pragma omp simd reduction(+ : variance)
  for (int64_t m = 0; m < z.count; ++m) variance += z.mass[m] * (z.x[m] - mean) * (z.x[m] - mean);
  return {mean, variance};
}

static BinSums soft_ranks(const Bins& z, double a) {
  const int64_t M = z.count;
  z.decay[0] = z.decay[M] = 0;
  for (int64_t first = 1; first < M; first += kTile) {
    const int n = int(M - first < kTile ? M - first : kTile);
    const double* x = z.x + first;
    exponentials([=](int i) INLINE_LAMBDA { return (x[i - 1] - x[i]) / a; }, n, z.decay + first);
  }
  decayed_sums(z, z.mass);
  double count = 0, beyond = z.slope[M] = 0;
  for (int64_t m = 0, k = M - 1; m < M; ++m, --k) {
    z.R[m] = count;
    count += z.mass[m];
    z.slope[k] = beyond += z.mass[k];  // slopes have no use for it yet
  }
  double own = 0, joint = 0, share = 0;
#pragma omp simd reduction(+ : own, joint, share)
  for (int64_t m = 0; m < M; ++m) {
    const double below = z.below[m] * z.decay[m], above = z.above[m + 1] * z.decay[m + 1], mass = z.mass[m];
    const double R = soft_rank(z.R[m] - below, z.slope[m + 1] - above), K = below + mass + above;
    own += mass * R * R;
    joint += R * z.ranks[m];
    share += mass * mass / K;
    z.R[m] = R;
    z.K[m] = K;
  }
  return {own, joint, share};
}

static void rank_lines(const Bins& z, const Correlation& c, double n, const MeanVariance& of, double g) {
  const int64_t M = z.count;
  const double mean = of.mean;
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) z.slope[m] = c.slope(z.mass[m], z.ranks[m], z.R[m]);
  decayed_sums(z, z.slope);
  double radial = 0;
#pragma omp simd reduction(+ : radial)
  for (int64_t m = 0; m < M; ++m) {
    const Line line = c.line(z.R[m], z.K[m], z.below[m + 1] + z.above[m + 1] * z.decay[m + 1]);
    radial += (z.x[m] - mean) * (line.slope * z.ranks[m] + z.mass[m] * line.offset);
    z.line[m] = line;
  }
  radial /= of.variance;
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) z.line[m] = finished(z.line[m], n, g, radial, z.x[m] - mean);
}
