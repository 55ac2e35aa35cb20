// The declared value of a loss, interpreted: a straight-line program over row statistics, forwards for the value and
// backwards for its slope. kdkernels/tape.py writes the program. Host and device.
#pragma once
#include <cmath>
#include <cstdint>
#ifdef __CUDACC__
#define KD_HD __host__ __device__ inline
#else
#define KD_HD inline
#endif

namespace kd {

enum Op { CONST, ADD, SUB, MUL, DIV, EXP, EXPM1, LOG, LOG1P, SQRT, SOFTPLUS, TIMES, GT, SELECT, DETACH };

KD_HD double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
KD_HD double sigmoid(double x) { return x > 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

// A view of the float64 tensor [K, R, E, out] + K flags + R x (op, a, b, c, constant) + E numbers of a separable loss.
struct Program {
  const double* data;
  KD_HD int points() const { return int(data[0]); }
  KD_HD int length() const { return int(data[1]); }
  KD_HD int elements() const { return int(data[2]); }
  KD_HD int out() const { return int(data[3]); }
  KD_HD int flags(int k) const { return int(data[4 + k]); }
  KD_HD const double* line(int i) const { return data + 4 + points() + 5 * i; }
  KD_HD int inputs() const { return 6 * points() + 4; }
  KD_HD int registers() const { return inputs() + length(); }
};

KD_HD double evaluate(const Program& p, double* reg) {
  const int first = p.inputs();
  for (int i = 0; i < p.length(); ++i) {
    const double* l = p.line(i);
    const double a = reg[int(l[1])], b = reg[int(l[2])], c = reg[int(l[3])];
    double& v = reg[first + i];
    switch (int(l[0])) {
      case CONST: v = l[4]; break;
      case ADD: v = a + b; break;
      case SUB: v = a - b; break;
      case MUL: v = a * b; break;
      case DIV: v = a / b; break;
      case EXP: v = exp(a); break;
      case EXPM1: v = expm1(a); break;
      case LOG: v = log(a); break;
      case LOG1P: v = log1p(a); break;
      case SQRT: v = sqrt(a); break;
      case SOFTPLUS: v = softplus(a); break;
      case TIMES: v = a == 0 ? 0 : a * b; break;
      case GT: v = a > b; break;
      case SELECT: v = a != 0 ? b : c; break;
      default: v = a;  // DETACH
    }
  }
  return reg[p.out()];
}

// adj: registers() doubles; on return adj[i] = d value / d reg[i] for the inputs. What gets no adjoint gives none, so
// that an infinite partial derivative of a branch not taken does no harm.
KD_HD void differentiate(const Program& p, const double* reg, double* adj) {
  const int first = p.inputs();
  for (int i = 0; i < p.registers(); ++i) adj[i] = 0;
  adj[p.out()] = 1;
  for (int i = p.length() - 1; i >= 0; --i) {
    const double g = adj[first + i], v = reg[first + i];
    if (g == 0) continue;
    const double* l = p.line(i);
    const int ia = int(l[1]), ib = int(l[2]), ic = int(l[3]);
    const double a = reg[ia], b = reg[ib];
    switch (int(l[0])) {
      case ADD: adj[ia] += g; adj[ib] += g; break;
      case SUB: adj[ia] += g; adj[ib] -= g; break;
      case MUL: adj[ia] += g * b; adj[ib] += g * a; break;
      case DIV: adj[ia] += g / b; adj[ib] -= g * v / b; break;
      case EXP: adj[ia] += g * v; break;
      case EXPM1: adj[ia] += g * (v + 1); break;
      case LOG: adj[ia] += g / a; break;
      case LOG1P: adj[ia] += g / (1 + a); break;
      case SQRT: adj[ia] += g / (2 * v); break;
      case SOFTPLUS: adj[ia] += g * sigmoid(a); break;
      case TIMES:
        if (a != 0) { adj[ia] += g * b; adj[ib] += g * a; }
        break;
      case SELECT: adj[a != 0 ? ib : ic] += g; break;
      default: break;  // CONST, GT and DETACH pass nothing on
    }
  }
}

}  // namespace kd
