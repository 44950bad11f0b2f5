// The math warpgroups: each has 64 of a head's columns, then some tiles of q_latent. Products are
// transposed, weights x tokens, as few tokens as there are. Numbers in brackets: README.md.
#pragma once

#include "../ring.cuh"
#include "../rotate.cuh"
#include "../sm90/copy.cuh"
#include "../sm90/wgmma_narrow.cuh"
#include "share.cuh"

namespace flashmla::queries {

template <class T, int kNopeTiles, int kTokens, bool kSplits>
class Math {
 public:
  using Storage = queries::Storage<kNopeTiles, kTokens, kSplits>;

  __device__ Math(Storage& storage, const QueriesParams& p, const Share& share)
      : storage_(storage), p_(p), share_(share) {}

  __device__ __forceinline__ void run() {
    project();
    kSplits ? add_splits() : keep_own();
    if (share_.is_down) {
      store_down();
    } else {
      absorb();
      if (share_.rank == 0 && has_rope()) rotate();
    }
  }

 private:
  using Sums = float[kTokens / 2];
  static constexpr int kChunks = kTile / kVectorColumns;  // of a token's row of a tile

  // [2] The warpgroup's columns of x W_Q, over the block's part of the width.
  __device__ __forceinline__ void project() {
    for (int step = share_.begin_step; step < share_.end_step; ++step) {
      wait_for_stage();
      multiply(group(), sm90::k_major_descriptor(sm90::shared_address(storage_.x[position_.slot])),
               sm90::kStepAlongRow, step != share_.begin_step);
      sm90::wgmma_wait<0>();
      release_stage();
    }
    sm90::pin_registers(sums_);
  }

  // sums (+)= a [64, 64 columns]ᵀ · b [tokens, 64]ᵀ, a being a tile of the stage.
  __device__ __forceinline__ void multiply(int tile, uint64_t b, uint64_t b_step, bool accumulate) {
    const uint64_t a = sm90::mn_major_descriptor(
        sm90::shared_address(storage_.weights[position_.slot] + tile * sm90::kTileBytes));
    sm90::pin_registers(sums_);
    sm90::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      sm90::wgmma_narrow<T, true>(sums_, a + step * sm90::kStepDownRows, b + step * b_step,
                                  accumulate || step > 0);
    }
    sm90::wgmma_commit();
  }

  // [3] A block that has a head to itself has its queries.
  __device__ __forceinline__ void keep_own() {
    store_tokens([&](int token, int chunk) {
      return sm90::shared_address(storage_.queries[group() * kChunks + chunk]) +
             token * sm90::kChunkBytes;
    });
    sm90::async_proxy_fence();
    meet();
  }

  // [4] Blocks that share a head: each adds up some columns of all and gives the sums to all.
  __device__ __forceinline__ void add_splits() {
    const int columns = vectors() * kVectorColumns;
    store_columns();
    sm90::async_proxy_fence();
    meet();
    const int other = thread();
    const bool gives = other < share_.splits && other != share_.rank;
    if (gives) {
      sm90::copy_to_block(storage_.others_columns(share_.rank * columns),
                          storage_.own_columns(other * columns), columns * Storage::kColumnBytes,
                          storage_.barriers.columns_ready, other);
    }
    sm90::barrier_wait(storage_.barriers.columns_ready, 0);
    for (int i = thread(); i < vectors() * kTokens; i += Storage::kGroups * kWarpgroup) {
      add_vector(i / kTokens, i % kTokens);
    }
    sm90::async_proxy_fence();
    meet();
    if (!share_.is_down) {
      uint8_t* const sums = storage_.queries[first_vector()];
      if (gives) {
        sm90::copy_to_block(sums, sums, vectors() * Storage::kVectorBytes,
                            storage_.barriers.queries_ready, other);
      }
      sm90::barrier_wait(storage_.barriers.queries_ready, 0);
    }
    if (gives) sm90::arrive_at_block(storage_.barriers.may_leave, other);
  }

  // The fragment as columns in float32.
  __device__ __forceinline__ void store_columns() {
    const int lane = thread() % 32;
    const int column = thread() / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      auto* const pairs = reinterpret_cast<float2*>(storage_.own_columns(column + i % 2 * 8));
      pairs[i / 2 * 4 + lane % 4] = {sums_[2 * i], sums_[2 * i + 1]};
    }
  }

  // Eight columns of a token, over the blocks in their order. Of others, the columns that this
  // block adds up came to where they have theirs.
  __device__ __forceinline__ void add_vector(int vector, int token) {
    float total[kVectorColumns] = {};
    for (int from = 0; from < share_.splits; ++from) {
      const uint8_t* const columns =
          from == share_.rank
              ? storage_.own_columns((first_vector() + vector) * kVectorColumns)
              : storage_.others_columns((from * vectors() + vector) * kVectorColumns);
#pragma unroll
      for (int i = 0; i < kVectorColumns; ++i) {
        total[i] += reinterpret_cast<const float*>(columns + i * Storage::kColumnBytes)[token];
      }
    }
    Vector<T>::pack(total).store(query(first_vector() + vector, token));
  }

  // [5] The columns that the block has added up, where they are not a head's.
  __device__ __forceinline__ void store_down() {
    const int first_column = share_.head * Storage::kColumns + first_vector() * kVectorColumns;
    for (int i = thread(); i < vectors() * kTokens; i += Storage::kGroups * kWarpgroup) {
      const int vector = i % vectors();
      const int token = i / vectors();
      const int column = first_column + vector * kVectorColumns;
      if (share_.first_token + token >= p_.tokens || column >= kHeadDimQk) continue;
      T* const row = static_cast<T*>(p_.projected) +
                     static_cast<long long>(share_.first_token + token) * kHeadDimQk;
      Vector<T>::load(query(first_vector() + vector, token)).store(row + column);
    }
  }

  // [6] q_nope W_UK: a warpgroup takes every so many-th tile, all free its stage.
  __device__ __forceinline__ void absorb() {
    for (int tile = share_.begin_tile; tile < share_.end_tile; ++tile) {
      wait_for_stage();
      const bool mine = tile % Storage::kGroups == group();
      if (mine) {
#pragma unroll
        for (int part = 0; part < kNopeTiles; ++part) {
          const uint64_t queries =
              sm90::plain_descriptor(sm90::shared_address(storage_.queries[part * kChunks]),
                                     Storage::kVectorBytes, 8 * sm90::kChunkBytes);
          multiply(part, queries, sm90::descriptor_step(2 * Storage::kVectorBytes), part > 0);
        }
        sm90::wgmma_wait<0>();
        sm90::pin_registers(sums_);
      }
      release_stage();
      if (mine) store_latent(tile);
    }
  }

  // [7] A tile of q_latent to global memory, 128 bytes of each token.
  __device__ __forceinline__ void store_latent(int tile) {
    const uint32_t out = sm90::shared_address(storage_.out(group()));
    meet_in_group();  // the tile before has been read
    store_tokens([&](int token, int chunk) { return out + sm90::swizzled_chunk(token, chunk); });
    meet_in_group();
    for_each_chunk([&](int token, int chunk, long long row) {
      const uint4 data = sm90::load_shared(out + sm90::swizzled_chunk(token, chunk));
      T* const latent = static_cast<T*>(p_.q_latent) + row * kKvLoraRank + tile * kTile;
      reinterpret_cast<uint4*>(latent)[chunk] = data;
    });
  }

  // [8] The rotary columns, by the warpgroup that has them.
  __device__ __forceinline__ void rotate() {
    p_.interleave ? rotate_as<true>() : rotate_as<false>();
  }
  template <bool kInterleaved>
  __device__ __forceinline__ void rotate_as() {
    for_each_chunk([&](int token, int chunk, long long row) {
      const auto key = [&](int vector) { return query(kNopeTiles * kChunks + vector, token); };
      const long long angles = static_cast<long long>(share_.first_token + token) * kRopePairs;
      rotate_vector<T, kInterleaved>(key, p_.cos + angles, p_.sin + angles, chunk)
          .store(static_cast<T*>(p_.q_rope) + row * kRopeDim + chunk * kVectorColumns);
    });
  }

  // The warpgroup's sums as T, each token's 64 columns as eight chunks at address(token, chunk).
  template <class Address>
  __device__ __forceinline__ void store_tokens(Address address) {
    const int lane = thread() % 32;
    const int chunk = thread() % kWarpgroup / 32 * 2 + lane / 8 % 2;
    const int row = lane / 16 * 8 + lane % 8;
    uint32_t pairs[kTokens / 4];
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) pairs[i] = pack_pair<T>(sums_[2 * i], sums_[2 * i + 1]);
    if constexpr (kTokens == 8) {
      sm90::store_transposed_x2(address(lane % 8, chunk), {pairs[0], pairs[1]});
    } else {
#pragma unroll
      for (int i = 0; i < kTokens / 16; ++i) {
        sm90::store_transposed_x4(
            address(i * 16 + row, chunk),
            {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]});
      }
    }
  }

  // visit(token, chunk, row) for this thread's chunks of the warpgroup's [tokens][8]; `row` is the
  // token's of this head in what is projected.
  template <class Visit>
  __device__ __forceinline__ void for_each_chunk(Visit visit) {
    for (int i = thread() % kWarpgroup; i < kTokens * 8; i += kWarpgroup) {
      const int token = i / 8;
      if (share_.first_token + token >= p_.tokens) return;
      const long long row =
          static_cast<long long>(share_.first_token + token) * p_.h_q + share_.head;
      visit(token, i % 8, row);
    }
  }

  __device__ __forceinline__ void wait_for_stage() {
    sm90::barrier_wait(storage_.barriers.full[position_.slot], position_.parity);
  }
  __device__ __forceinline__ void release_stage() {
    __syncwarp();
    if (thread() % 32 == 0) sm90::barrier_arrive(storage_.barriers.empty[position_.slot]);
    position_.advance();
  }

  // Of a head's columns, those that this block adds up.
  __device__ __forceinline__ int vectors() const { return Storage::kVectors / share_.splits; }
  __device__ __forceinline__ int first_vector() const { return share_.rank * vectors(); }

  __device__ __forceinline__ T* query(int vector, int token) const {
    return reinterpret_cast<T*>(storage_.queries[vector]) + token * kVectorColumns;
  }
  __device__ static __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int group() const {
    return __shfl_sync(~0u, thread() / kWarpgroup, 0);
  }
  __device__ __forceinline__ bool has_rope() const { return group() == kNopeTiles; }
  __device__ static __forceinline__ void meet() {
    sm90::named_barrier_sync(kMathMeet, Storage::kGroups * kWarpgroup);
  }
  __device__ __forceinline__ void meet_in_group() const {
    sm90::named_barrier_sync(kWarpgroupMeet + group(), kWarpgroup);
  }

  Storage& storage_;
  const QueriesParams& p_;
  const Share& share_;
  RingPosition<Storage::kStages> position_;
  Sums sums_;
};

}  // namespace flashmla::queries
