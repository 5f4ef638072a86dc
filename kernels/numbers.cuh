// Neighbouring numbers of any storage type, a few at a time: 16 bytes move as fast as two.
#pragma once

#include "device.cuh"

template <int N> struct Numbers { float at[N]; };

// N is 1, or a multiple of 8; then `from` and `to` are 16-byte aligned.
template <int N, typename T> DEVICE Numbers<N> load_numbers(const T* from) {
    Numbers<N> numbers;
    if constexpr (N == 1) {
        numbers.at[0] = to_f32(from[0]);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            float4 four = load_vector<float4>(from + i);
            numbers.at[i] = four.x, numbers.at[i + 1] = four.y, numbers.at[i + 2] = four.z, numbers.at[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            uint4 eight = load_vector<uint4>(from + i);
            uint32_t packed[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float2 pair = unpack<T>(packed[j]);
                numbers.at[i + 2 * j] = pair.x, numbers.at[i + 2 * j + 1] = pair.y;
            }
        }
    }
    return numbers;
}

template <int N, typename T> DEVICE void store_numbers(T* to, const Numbers<N>& numbers) {
    const float* x = numbers.at;
    if constexpr (N == 1) {
        to[0] = from_f32<T>(x[0]);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < N; i += 4) store_vector(to + i, float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            store_vector(to + i, uint4{pack<T>(x[i], x[i + 1]), pack<T>(x[i + 2], x[i + 3]),
                                       pack<T>(x[i + 4], x[i + 5]), pack<T>(x[i + 6], x[i + 7])});
        }
    }
}

// to[i] = f(from[i]…) for N numbers.
template <int N, typename To, typename F, typename... From> DEVICE void map_numbers(To* to, F f, const From*... from) {
    auto apply = [&](const auto&... numbers) {
        Numbers<N> results;
#pragma unroll
        for (int i = 0; i < N; ++i) results.at[i] = f(numbers.at[i]...);
        store_numbers(to, results);
    };
    apply(load_numbers<N>(from)...);
}

template <int N> using Count = std::integral_constant<int, N>;

// f(Count<8>()) for rows whose width is a multiple of 8, so that each begins aligned; otherwise f(Count<1>()).
template <typename F> DEVICE void by_width(int width, F f) {
    if (width % 8 == 0) f(Count<8>());
    else f(Count<1>());
}
