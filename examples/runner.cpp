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
using executorch::runtime::EValue;
using namespace executorch::extension;

[[noreturn]] void fail(const char* what, int error) {
  std::fprintf(stderr, error ? "runner: %s (ExecuTorch error %d)\n" : "runner: %s\n", what, error);
  std::exit(1);
}

class Model {
 public:
  explicit Model(const char* file) : module_(file, Module::LoadMode::Mmap) {
    auto meta = module_.method_meta("step");
    if (!meta.ok()) fail("not a file of llamba export, or damaged", int(meta.error()));
    for (size_t i = 1; i < meta->num_inputs(); ++i) {  // input 0 is the token, the others are the state: all zeros
      auto info = meta->input_tensor_meta(i);
      if (!info.ok()) fail("not a file of llamba export", int(info.error()));
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
    std::vector<SizesType> shape(length == 1 ? 1 : 2, 1);  // (1) or (1, length)
    shape.back() = SizesType(length);
    std::vector<TensorPtr> tensors{from_blob(ids, shape, ScalarType::Long)};
    for (size_t i = 0; i < state_.size(); ++i) tensors.push_back(from_blob(state_[i].data(), shapes_[i]));
    auto out = module_.execute(length == 1 ? "step" : "prefill", std::vector<EValue>(tensors.begin(), tensors.end()));
    if (!out.ok() || out->size() != state_.size() + 1) fail("could not run", int(out.error()));
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

int64_t whole(const char* word) {
  char* end;
  const int64_t number = std::strtoll(word, &end, 10);
  if (*end || end == word || number < 0) fail((std::string(word) + " is no whole number").c_str(), 0);
  return number;
}

int main(int count, char** words) {
  if (count < 4) {
    std::fprintf(stderr, "usage: runner FILE.pte NEW ID...\n");
    return 2;
  }
  Model model(words[1]);
  const int64_t fresh = whole(words[2]);
  const size_t piece = model.number("piece"), vocabulary = model.number("vocab_size");
  std::vector<int64_t> ids;
  for (int i = 3; i < count; ++i) ids.push_back(whole(words[i]));
  if (piece < 1 || *std::max_element(ids.begin(), ids.end()) >= int64_t(vocabulary)) fail("no such id", 0);
  int64_t next = 0;
  for (size_t at = 0, length; at < ids.size(); at += length)  // whole pieces, then one by one
    next = model.read(&ids[at], length = ids.size() - at >= piece ? piece : 1);
  const auto begun = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < fresh; ++i) {
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
