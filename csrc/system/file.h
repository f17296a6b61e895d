// The first bytes of a small file, of those in which a system says what it has.
#pragma once

#include <cstdio>
#include <string>

namespace batchnorm {

// Empty where there is none. By C's streams, whose locks a fork leaves free in the child; those of
// C++'s locales it does not.
inline std::string contents_of(const std::string& path) {
  std::string contents(4096, '\0');
  std::FILE* const file = std::fopen(path.c_str(), "r");
  if (!file) return {};
  contents.resize(std::fread(contents.data(), 1, contents.size(), file));
  std::fclose(file);
  return contents;
}

}  // namespace batchnorm
