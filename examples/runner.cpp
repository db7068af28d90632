// Writes text with a file of `llamba export --to executorch`, without Python and without PyTorch. See README.md here.
//
//     runner FILE.pte NEW ID...        reads the token ids, then writes NEW ids, always the most likely one
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::EValue;

[[noreturn]] void fail(const char* what, int error) {
  std::fprintf(stderr, "runner: %s (ExecuTorch error %d)\n", what, error);
  std::exit(1);
}

class Model {
 public:
  explicit Model(const char* file) : module_(file, Module::LoadMode::Mmap) {
    auto meta = module_.method_meta("step");
    if (!meta.ok()) fail("not a file of llamba export, or damaged", int(meta.error()));
    for (size_t i = 1; i < meta->num_inputs(); ++i) {  // input 0 is the token, the others are the state: all zeros
      auto info = meta->input_tensor_meta(i);
      shapes_.emplace_back(info->sizes().begin(), info->sizes().end());
      state_.emplace_back(info->nbytes() / sizeof(float), 0.f);
    }
  }

  size_t number(const char* name) {
    auto found = module_.execute(name);
    if (!found.ok()) fail("not a file of llamba export", int(found.error()));
    return found->at(0).toInt();
  }

  // Some tokens of the text: afterwards the state knows them. Returns the most likely next token.
  int64_t read(int64_t* ids, size_t length) {
    std::vector<SizesType> shape = length == 1 ? std::vector<SizesType>{1} : std::vector<SizesType>{1, SizesType(length)};
    std::vector<TensorPtr> tensors{from_blob(ids, shape, ScalarType::Long)};
    for (size_t i = 0; i < state_.size(); ++i) tensors.push_back(from_blob(state_[i].data(), shapes_[i]));
    auto out = module_.execute(length == 1 ? "step" : "prefill", std::vector<EValue>(tensors.begin(), tensors.end()));
    if (!out.ok()) fail("could not run", int(out.error()));
    for (size_t i = 0; i < state_.size(); ++i)
      std::copy_n(out->at(i + 1).toTensor().const_data_ptr<float>(), state_[i].size(), state_[i].data());
    auto logits = out->at(0).toTensor();
    const float* last = logits.const_data_ptr<float>() + logits.numel() - logits.size(logits.dim() - 1);
    return std::max_element(last, last + logits.size(logits.dim() - 1)) - last;
  }

 private:
  Module module_;
  std::vector<std::vector<SizesType>> shapes_;
  std::vector<std::vector<float>> state_;
};

int main(int count, char** words) {
  if (count < 4) {
    std::fprintf(stderr, "usage: runner FILE.pte NEW ID...\n");
    return 2;
  }
  Model model(words[1]);
  const long fresh = std::atol(words[2]);
  const size_t piece = model.number("piece"), vocabulary = model.number("vocab_size");
  std::vector<int64_t> ids;
  for (int i = 3; i < count; ++i) ids.push_back(std::atoll(words[i]));
  for (int64_t id : ids)
    if (id < 0 || size_t(id) >= vocabulary) fail("an id is not in the vocabulary", 0);
  int64_t next = 0;
  size_t at = 0;
  while (at < ids.size()) {  // whole pieces, then one by one
    size_t length = ids.size() - at >= piece ? piece : 1;
    next = model.read(&ids[at], length);
    at += length;
  }
  const auto begun = std::chrono::steady_clock::now();
  for (long i = 0; i < fresh; ++i) {
    std::printf("%lld ", static_cast<long long>(next));
    next = model.read(&next, 1);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  double peak = 0;
  std::ifstream status("/proc/self/status");  // Linux: the largest memory of this process, and of nothing before it
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM:", 0) == 0) peak = std::atof(line.c_str() + 6) / 1024;
  std::fprintf(stderr, "\n%.0f tokens/s, at most %.1f MiB of memory\n", fresh / seconds, peak);
}
