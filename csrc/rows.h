// Rows of activations and outputs: where they lie, and what kernels ask of them. Included inside
// the anonymous namespaces of linear.cpp and linear_groups.cpp. Needs scalar.h and memory.h.

inline int64_t size_of(Type type) {
  return type == F32 || type == I32 ? 4 : type == U8 || type == S8 ? 1 : 2;
}

inline void* advance(void* base, int64_t elements, Type type) {
  return static_cast<char*>(base) + elements * size_of(type);
}

inline const void* advance(const void* base, int64_t elements, Type type) {
  return static_cast<const char*>(base) + elements * size_of(type);
}

inline const void* row_of(const Input& x, int64_t m) { return advance(x.x, m * x.stride, x.type); }

// The same, for rows counted from `row`.
inline Post from_row(Post post, int64_t row, Type type) {
  if (post.residual) post.residual = advance(post.residual, row * post.residual_stride, type);
  return post;
}

// n floats padded to whole panels, since kernels read whole vectors.
inline const float* padded(Room<float>& room, const float* values, int64_t n) {
  if (!values || n % kPanel == 0) return values;
  const int64_t whole = round_up(n, kPanel);
  float* to = room.get(whole);
  for (int64_t i = 0; i < whole; i++) to[i] = i < n ? values[i] : 0.0f;
  return to;
}

template <Type T>
inline void to_floats_of(const Input& x, int64_t begin, int64_t count, int64_t k, float* to) {
  for (int64_t i = 0; i < count; i++) {
    const void* from = row_of(x, begin + i);
    for (int64_t j = 0; j < k; j++) to[i * k + j] = scalar_load<T>(from, j);
  }
}

// Rows [begin, begin + count) as float32, [count][k]: where they lie if that will do, or in `room`.
inline const float* to_floats(const Input& x, int64_t begin, int64_t count, int64_t k,
                              float* room) {
  if (x.type == F32) return static_cast<const float*>(row_of(x, begin));
  if (x.type == BF16)
    to_floats_of<BF16>(x, begin, count, k, room);
  else
    to_floats_of<F16>(x, begin, count, k, room);
  return room;
}
