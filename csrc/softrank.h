// What becomes of LapSum's bins on every machine: soft ranks R_i = sum_j F((x_i - x_j) / a) [Struski et al. 2025], F the
// Laplace distribution function, the loss 1 - rho, and its slope as a line in each bin. In units of n: masses c / n,
// ranks centred and over n.
#pragma once
#include "tape.h"

namespace kd {

// Unsigned integers in the order of the numbers, of which these are the bits of a 16-bit type; -0 and +0 the same.
KD_HD uint16_t key_of(uint16_t bits) {
  return bits == 0x8000 ? 0x8000 : uint16_t(bits ^ (bits & 0x8000 ? 0xffff : 0x8000));
}
KD_HD uint16_t bits_of_key(uint16_t key) { return uint16_t(key ^ (key & 0x8000 ? 0x8000 : 0xffff)); }

// Twice the rank (ties averaged) of each of c equal numbers, `below` of n below them, minus n + 1: an integer.
KD_HD int64_t centred_rank(int64_t below, int64_t c, int64_t n) { return 2 * below + c - n; }

// The line rank -> gradient of the classes in a bin: slope * (the teacher's doubled centred rank) + offset.
struct Line { double slope, offset; };

// Of the bins on either side, their mass less the kernel's sum over it: small, and exact, where the bandwidth is large.
KD_HD double soft_rank(double lost_below, double lost_above) { return (lost_below - lost_above) / 2; }

// Of a row whose soft ranks are known. The loss's slope by R_i is (ct T_i + cr R_i) / n.
struct Correlation {
  double scale, rho, ct, cr;

  // own, joint: sums of mass R^2 and of R ranks; squares: of the teacher's doubled centred ranks.
  KD_HD Correlation(double n, double a, double own, double joint, double squares) {
    const double teacher = squares / (4 * n * n * n);
    scale = 1 / (2 * a * n);
    rho = joint / sqrt(own) / sqrt(teacher);
    ct = -1 / sqrt(own) / sqrt(teacher);
    cr = rho / own;
  }
  KD_HD double slope(double mass, double ranks, double R) const { return ct * ranks + cr * mass * R; }
  // K, G: the kernel's sums over all masses and over all slopes.
  KD_HD Line line(double R, double K, double G) const { return {scale * ct * K, scale * (cr * R * K - G)}; }
};

// g times the line of a bin at distance d from the mean, its way through a, which follows the deviation, included.
// radial: the sum of d (slope ranks + mass offset) over the bins, over the variance.
KD_HD Line finished(const Line& line, double n, double g, double radial, double d) {
  return {g * line.slope / (2 * n), g * (line.offset - radial * d)};
}

}  // namespace kd
